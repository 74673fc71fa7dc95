// The Python module fastsam._C. Importing it registers the operators of ops.cpp; its functions compare in every step
// what thousands of tensors are (describe.cpp, watch.cpp) and whether they are still the same objects (here).
//
// Results are bytes, an int64 for each number, to be compared with those of the step before.
#include <Python.h>

#include <cstdint>

#include "python.h"
#include "watch.h"

namespace {

int64_t identity(const void* object) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(object)); }

// A bytes object for `count` numbers, and where they go; nullptr and an exception if there is no memory.
PyObject* make_numbers(Py_ssize_t count, int64_t** numbers) {
  PyObject* result = PyBytes_FromStringAndSize(nullptr, count * static_cast<Py_ssize_t>(sizeof(int64_t)));
  if (result != nullptr) *numbers = reinterpret_cast<int64_t*>(PyBytes_AsString(result));
  return result;
}

// identities(objects: list) -> bytes
PyObject* identities(PyObject*, PyObject* objects) {
  if (!PyList_Check(objects)) {
    PyErr_SetString(PyExc_TypeError, "identities() takes a list");
    return nullptr;
  }
  int64_t* numbers = nullptr;
  PyObject* result = make_numbers(PyList_Size(objects), &numbers);
  for (Py_ssize_t i = 0; result != nullptr && i < PyList_Size(objects); ++i) {
    numbers[i] = identity(PyList_GetItem(objects, i));
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
  int64_t* numbers = nullptr;
  PyObject* result = make_numbers(PyDict_Size(entries) * (2 + name_count), &numbers);
  if (result == nullptr) return nullptr;
  PyObject *key = nullptr, *inner = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(entries, &position, &key, &inner);) {
    *numbers++ = identity(key);
    *numbers++ = identity(inner);
    for (Py_ssize_t i = 0; i < name_count; ++i) {
      *numbers++ = PyDict_Check(inner) ? identity(PyDict_GetItem(inner, PyTuple_GetItem(names, i))) : 0;
    }
  }
  return result;
}

// is_unchanged(number: int) -> bool: whether the tensors handed to torch.ops.fastsam.watch are what they were then.
PyObject* is_unchanged(PyObject*, PyObject* argument) {
  const int64_t number = PyLong_AsLongLong(argument);
  if (number == -1 && PyErr_Occurred() != nullptr) return nullptr;
  return PyBool_FromLong(fastsam::is_unchanged(number));
}

// unwatch(number: int) -> None
PyObject* unwatch(PyObject*, PyObject* argument) {
  const int64_t number = PyLong_AsLongLong(argument);
  if (number == -1 && PyErr_Occurred() != nullptr) return nullptr;
  fastsam::unwatch(number);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"describe", fastsam::describe, METH_VARARGS, nullptr},
                         {"read_grads", fastsam::read_grads, METH_VARARGS, nullptr},
                         {"learn_storage_offset", fastsam::learn_storage_offset, METH_VARARGS, nullptr},
                         {"identities", identities, METH_O, nullptr},
                         {"nested_identities", nested_identities, METH_VARARGS, nullptr},
                         {"is_unchanged", is_unchanged, METH_O, nullptr},
                         {"unwatch", unwatch, METH_O, nullptr},
                         {"spec", fastsam::spec, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&definition); }
