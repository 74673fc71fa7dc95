// The Python module fastsam._C. Importing it registers the operators of ops.cpp; its functions look at what every step
// has to look at for thousands of tensors: addresses, metadata, and whether they are still the same objects.
//
// Each returns bytes, one int64 per answer, to be compared with those of the step before.
#include <Python.h>

#include <cstdint>
#include <new>
#include <vector>

#include "python.h"
#include "watch.h"

// torch refuses its copy of DLPack's header under its own stable ABI. DLPack has a version of its own, asked below.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

namespace {

int64_t identity(const void* object) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(object)); }

PyObject* to_bytes(const std::vector<int64_t>& answers) {
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(answers.data()),
                                   static_cast<Py_ssize_t>(answers.size() * sizeof(int64_t)));
}

// A bytes object for `count` answers, and where they go; nullptr and an exception if there is no memory.
PyObject* make_answers(Py_ssize_t count, int64_t** answers) {
  PyObject* result = PyBytes_FromStringAndSize(nullptr, count * static_cast<Py_ssize_t>(sizeof(int64_t)));
  if (result != nullptr) *answers = reinterpret_cast<int64_t*>(PyBytes_AsString(result));
  return result;
}

// A question that a tensor answers with True or False. Looked up once for all tensors: that takes as long as calling
// it.
class Question {
 public:
  Question(PyObject* type, const char* method) : function_(PyObject_GetAttrString(type, method)) {}
  Question(const Question&) = delete;
  Question& operator=(const Question&) = delete;
  ~Question() { Py_XDECREF(function_); }

  // -1 and an exception if it cannot be answered.
  int ask(PyObject* tensor) const {
    if (function_ == nullptr) return -1;
    PyObject* answer = PyObject_CallFunctionObjArgs(function_, tensor, nullptr);
    if (answer == nullptr) return -1;
    const int result = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return result;
  }

 private:
  PyObject* function_;
};

struct Questions {
  Question is_conj, is_neg;
};

// Appends to `metadata` that of `tensor`, and its address to `addresses`; false and an exception if it cannot be
// told this way (a sparse tensor, say).
bool describe_one(PyObject* tensor, DLPackDLTensorFromPyObjectNoSync view, const Questions& questions,
                  std::vector<int64_t>& addresses, std::vector<int64_t>& metadata) {
  DLTensor seen;
  if (view(tensor, &seen) != 0) return false;
  int64_t elements = 1;
  for (int32_t i = 0; i < seen.ndim; ++i) elements *= seen.shape[i];
  // DLPack knows of no lazy conjugation or negation. A negated real tensor is every other number of a complex one,
  // which its strides tell, unless it is a single element.
  const bool is_complex = seen.dtype.code == kDLComplex;
  const int conjugated = is_complex ? questions.is_conj.ask(tensor) : 0;
  const int negated = conjugated >= 0 && (is_complex || elements == 1) ? questions.is_neg.ask(tensor) : 0;
  if (conjugated < 0 || negated < 0) return false;
  addresses.push_back(identity(seen.data) + static_cast<int64_t>(seen.byte_offset));
  metadata.push_back(int64_t{seen.device.device_type} << 32 | seen.device.device_id);
  metadata.push_back(int64_t{seen.dtype.code} << 24 | int64_t{seen.dtype.bits} << 16 | conjugated << 1 | negated);
  metadata.push_back(seen.ndim);
  metadata.insert(metadata.end(), seen.shape, seen.shape + seen.ndim);
  metadata.insert(metadata.end(), seen.strides, seen.strides + seen.ndim);
  return true;
}

// describe(tensors: list, Tensor: type, exchange_api) -> (bytes, bytes) or None: the address of each tensor (0 for
// None), and their metadata: device, dtype, shape, strides. None: ask them in Python.
PyObject* describe(PyObject*, PyObject* arguments) {
  PyObject *tensors = nullptr, *type = nullptr, *capsule = nullptr;
  if (!PyArg_ParseTuple(arguments, "O!O!O:describe", &PyList_Type, &tensors, &PyType_Type, &type, &capsule)) {
    return nullptr;
  }
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  if (api->header.version.major != DLPACK_MAJOR_VERSION || api->dltensor_from_py_object_no_sync == nullptr) {
    Py_RETURN_NONE;
  }
  try {
    const Questions questions{{type, "is_conj"}, {type, "is_neg"}};
    std::vector<int64_t> addresses, metadata;
    addresses.reserve(PyList_Size(tensors));
    metadata.reserve(5 * PyList_Size(tensors));
    for (Py_ssize_t i = 0; i < PyList_Size(tensors); ++i) {
      PyObject* tensor = PyList_GetItem(tensors, i);
      if (tensor == Py_None) {
        addresses.push_back(0);
        metadata.push_back(-1);
      } else if (!PyType_IsSubtype(Py_TYPE(tensor), reinterpret_cast<PyTypeObject*>(type))) {
        PyErr_SetString(PyExc_TypeError, "describe() takes a list of tensors");
        return nullptr;
      } else if (!describe_one(tensor, api->dltensor_from_py_object_no_sync, questions, addresses, metadata)) {
        PyErr_Clear();
        Py_RETURN_NONE;
      }
    }
    PyObject *first = to_bytes(addresses), *second = to_bytes(metadata), *result = nullptr;
    if (first != nullptr && second != nullptr) result = PyTuple_Pack(2, first, second);
    Py_XDECREF(first);
    Py_XDECREF(second);
    return result;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
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

PyMethodDef methods[] = {{"describe", describe, METH_VARARGS, nullptr},
                         {"identities", identities, METH_O, nullptr},
                         {"nested_identities", nested_identities, METH_VARARGS, nullptr},
                         {"is_unchanged", is_unchanged, METH_O, nullptr},
                         {"unwatch", unwatch, METH_O, nullptr},
                         {"spec", fastsam::spec, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&definition); }
