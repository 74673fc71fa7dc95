// The Python module fastsam._C. Importing it registers the operators of ops.cpp; its functions look at what every step
// has to look at for thousands of tensors: where they are, and whether they are still the same objects.
//
// Each returns bytes, one int64 per answer, to be compared with those of the step before.
#include <Python.h>

#include <cstdint>
#include <exception>

namespace {

// Returns a tensor's data pointer and throws for anything else; torch hands the function out for compiled callers.
using DataPtr = void* (*)(PyObject*);

int64_t identity(const void* object) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(object)); }

// A bytes object for `count` answers, and where they go; nullptr and an exception if there is no memory.
PyObject* make_answers(Py_ssize_t count, int64_t** answers) {
  PyObject* result = PyBytes_FromStringAndSize(nullptr, count * static_cast<Py_ssize_t>(sizeof(int64_t)));
  if (result != nullptr) *answers = reinterpret_cast<int64_t*>(PyBytes_AsString(result));
  return result;
}

// addresses(tensors: list, data_ptr: int) -> bytes: 0 for None.
PyObject* addresses(PyObject*, PyObject* arguments) {
  PyObject* tensors = nullptr;
  unsigned long long function = 0;
  if (!PyArg_ParseTuple(arguments, "OK:addresses", &tensors, &function)) return nullptr;
  if (!PyList_Check(tensors) || function == 0) {
    PyErr_SetString(PyExc_TypeError, "addresses() takes a list of tensors and the address of torch's data_ptr");
    return nullptr;
  }
  const auto data_ptr = reinterpret_cast<DataPtr>(static_cast<uintptr_t>(function));
  int64_t* answers = nullptr;
  PyObject* result = make_answers(PyList_Size(tensors), &answers);
  if (result == nullptr) return nullptr;
  try {
    for (Py_ssize_t i = 0; i < PyList_Size(tensors); ++i) {
      PyObject* tensor = PyList_GetItem(tensors, i);
      answers[i] = tensor == Py_None ? 0 : identity(data_ptr(tensor));
    }
  } catch (const std::exception& error) {
    Py_DECREF(result);
    PyErr_SetString(PyExc_TypeError, error.what());
    return nullptr;
  }
  return result;
}

// identities(objects: list) -> bytes
PyObject* identities(PyObject*, PyObject* objects) {
  if (!PyList_Check(objects)) {
    PyErr_SetString(PyExc_TypeError, "identities() takes a list");
    return nullptr;
  }
  int64_t* answers = nullptr;
  PyObject* result = make_answers(PyList_Size(objects), &answers);
  for (Py_ssize_t i = 0; result != nullptr && i < PyList_Size(objects); ++i) {
    answers[i] = identity(PyList_GetItem(objects, i));
  }
  return result;
}

// nested_identities(entries: dict of dicts, names: tuple) -> bytes: for each entry its key, its dict, and what that has
// under each name (0: nothing).
PyObject* nested_identities(PyObject*, PyObject* arguments) {
  PyObject *entries = nullptr, *names = nullptr;
  if (!PyArg_ParseTuple(arguments, "O!O!:nested_identities", &PyDict_Type, &entries, &PyTuple_Type, &names)) {
    return nullptr;
  }
  const Py_ssize_t name_count = PyTuple_Size(names);
  int64_t* answers = nullptr;
  PyObject* result = make_answers(PyDict_Size(entries) * (2 + name_count), &answers);
  if (result == nullptr) return nullptr;
  PyObject *key = nullptr, *inner = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(entries, &position, &key, &inner);) {
    *answers++ = identity(key);
    *answers++ = identity(inner);
    for (Py_ssize_t i = 0; i < name_count; ++i) {
      *answers++ = PyDict_Check(inner) ? identity(PyDict_GetItem(inner, PyTuple_GetItem(names, i))) : 0;
    }
  }
  return result;
}

PyMethodDef methods[] = {{"addresses", addresses, METH_VARARGS, nullptr},
                         {"identities", identities, METH_O, nullptr},
                         {"nested_identities", nested_identities, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&definition); }
