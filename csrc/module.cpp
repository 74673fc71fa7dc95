// The Python module fastsam._C. Importing it registers the operators of ops.cpp; it also reads the addresses of a list
// of tensors, which every step does for thousands of them.
#include <Python.h>

#include <cstdint>
#include <exception>

namespace {

// Returns a tensor's data pointer and throws for anything else; torch hands the function out for compiled callers.
using DataPtr = void* (*)(PyObject*);

// addresses(tensors: list, data_ptr: int) -> bytes: one int64 per tensor, 0 for None.
PyObject* addresses(PyObject*, PyObject* arguments) {
  PyObject* tensors = nullptr;
  unsigned long long function = 0;
  if (!PyArg_ParseTuple(arguments, "OK:addresses", &tensors, &function)) return nullptr;
  if (!PyList_Check(tensors) || function == 0) {
    PyErr_SetString(PyExc_TypeError, "addresses() takes a list of tensors and the address of torch's data_ptr");
    return nullptr;
  }
  const auto data_ptr = reinterpret_cast<DataPtr>(static_cast<uintptr_t>(function));
  const Py_ssize_t count = PyList_Size(tensors);
  PyObject* result = PyBytes_FromStringAndSize(nullptr, count * static_cast<Py_ssize_t>(sizeof(int64_t)));
  if (result == nullptr) return nullptr;
  auto* target = reinterpret_cast<int64_t*>(PyBytes_AsString(result));
  try {
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* tensor = PyList_GetItem(tensors, i);
      target[i] = tensor == Py_None ? 0 : reinterpret_cast<int64_t>(data_ptr(tensor));
    }
  } catch (const std::exception& error) {
    Py_DECREF(result);
    PyErr_SetString(PyExc_TypeError, error.what());
    return nullptr;
  }
  return result;
}

PyMethodDef methods[] = {{"addresses", addresses, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&definition); }
