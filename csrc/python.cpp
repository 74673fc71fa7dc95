// The Python module fastsam._C. Importing it registers the operators of ops.cpp; its functions look at what every step
// has to look at for thousands of tensors: addresses, metadata, and whether they are still the same objects.
//
// The answers are bytes, an int64 each, to be compared with those of the step before.
#include <Python.h>

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "python.h"
#include "watch.h"

// torch refuses its copy of DLPack's header under its own stable ABI. DLPack has a version of its own, asked below.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

namespace {

int64_t identity(const void* object) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(object)); }

// A bytes object for `count` answers, and where they go; nullptr and an exception if there is no memory.
PyObject* make_answers(Py_ssize_t count, int64_t** answers) {
  PyObject* result = PyBytes_FromStringAndSize(nullptr, count * static_cast<Py_ssize_t>(sizeof(int64_t)));
  if (result != nullptr) *answers = reinterpret_cast<int64_t*>(PyBytes_AsString(result));
  return result;
}

struct Release {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};

// A reference that is ours; nullptr where there is none.
using Reference = std::unique_ptr<PyObject, Release>;

// A question that a tensor answers with True or False. Looked up once for all tensors: that takes as long as calling
// it.
class Question {
 public:
  Question(PyObject* type, const char* method) : function_(PyObject_GetAttrString(type, method)) {}

  // -1 and an exception if it cannot be answered.
  int ask(PyObject* tensor) const {
    if (function_ == nullptr) return -1;
    const Reference answer(PyObject_CallFunctionObjArgs(function_.get(), tensor, nullptr));
    return answer == nullptr ? -1 : PyObject_IsTrue(answer.get());
  }

 private:
  Reference function_;
};

// A row of answers, which are usually those of the last time: as long as they are, they are only compared.
class Answers {
 public:
  // `known`: the bytes of the last time; anything else: there are none.
  explicit Answers(PyObject* known) : known_(known) {
    if (!PyBytes_Check(known)) return;
    begin_ = next_ = reinterpret_cast<const int64_t*>(PyBytes_AsString(known));
    end_ = begin_ + PyBytes_Size(known) / static_cast<Py_ssize_t>(sizeof(int64_t));
  }

  void add(int64_t word) {
    if (next_ != end_ && *next_ == word) {
      ++next_;
    } else {
      part();
      others_.push_back(word);
    }
  }

  // A new reference, to `known` itself if all answers are the same; nullptr and an exception if there is no memory.
  PyObject* to_bytes() {
    if (begin_ != nullptr && next_ == end_) {
      Py_INCREF(known_);
      return known_;
    }
    part();
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(others_.data()),
                                     static_cast<Py_ssize_t>(others_.size() * sizeof(int64_t)));
  }

 private:
  // The first answer that is another one: from here on they are collected.
  void part() {
    if (next_ == nullptr) return;
    others_.assign(begin_, next_);
    begin_ = next_ = end_ = nullptr;
  }

  PyObject* known_;
  const int64_t *begin_ = nullptr, *next_ = nullptr, *end_ = nullptr;
  std::vector<int64_t> others_;
};

// How tensors are asked: by DLPack's interface for C, of which each torch has its own version.
struct Interface {
  PyTypeObject* type;
  DLPackDLTensorFromPyObjectNoSync view;
  Question is_conj, is_neg;

  Interface(PyObject* type, const DLPackExchangeAPI* api)
      : type(reinterpret_cast<PyTypeObject*>(type)),
        view(api->header.version.major == DLPACK_MAJOR_VERSION ? api->dltensor_from_py_object_no_sync : nullptr),
        is_conj(type, "is_conj"),
        is_neg(type, "is_neg") {}
};

// gcc takes a function that only prefetches for one without an effect, and drops its calls.
#define FASTSAM_ALWAYS_INLINE __attribute__((always_inline))

// In a tensor object, how many words before the sizes the pointer to its storage is; 0: not known.
int storage_word = 0;

// Whether sizes and strides are in the tensor object, which has room for five of each, one after the other. More are
// elsewhere, and further apart.
bool is_inline(const DLTensor& seen) { return seen.strides == seen.shape + 5; }

// Where the objects behind a tensor were when it was last asked. They are only prefetched from there: reading thousands
// of small tensors is bound by cache misses. A wrong address does no harm.
struct Place {
  // Numbers: no arithmetic is defined for pointers to what may be gone.
  uintptr_t sizes, storage;

  void note(const DLTensor& seen) {
    sizes = reinterpret_cast<uintptr_t>(seen.shape);
    if (storage_word > 0 && is_inline(seen)) storage = static_cast<uintptr_t>(seen.shape[-storage_word]);
  }

  FASTSAM_ALWAYS_INLINE void prefetch() const {
    for (const uintptr_t line : {sizes - 64, sizes, sizes + 64, sizes + 128, storage, storage + 63}) {
      __builtin_prefetch(reinterpret_cast<const void*>(line));
    }
  }
};

// The addresses of tensors (0 for None), and their metadata: device, dtype, shape, strides.
class Description {
 public:
  // `known`: a tuple, the description of the last time.
  explicit Description(PyObject* known) : addresses_(part(known, 0)), metadata_(part(known, 1)) {}

  // 1; 0 if a tensor cannot be asked this way (a sparse one, say); -1 and an exception if it is no tensor.
  int add(PyObject* tensor, const Interface& interface, Place* place = nullptr) {
    if (tensor == Py_None) {
      addresses_.add(0);
      metadata_.add(-1);
      return 1;
    }
    if (Py_TYPE(tensor) != type_ && !PyType_IsSubtype(Py_TYPE(tensor), interface.type)) {
      PyErr_SetString(PyExc_TypeError, "expected tensors");
      return -1;
    }
    type_ = Py_TYPE(tensor);
    DLTensor seen;
    if (interface.view(tensor, &seen) != 0) return 0;
    int64_t elements = 1;
    for (int32_t i = 0; i < seen.ndim; ++i) elements *= seen.shape[i];
    // DLPack knows of no lazy conjugation or negation. A negated real tensor is every other number of a complex one,
    // which its strides tell, unless it is a single element.
    const bool is_complex = seen.dtype.code == kDLComplex;
    const int conjugated = is_complex ? interface.is_conj.ask(tensor) : 0;
    const int negated = conjugated >= 0 && (is_complex || elements == 1) ? interface.is_neg.ask(tensor) : 0;
    if (conjugated < 0 || negated < 0) return 0;
    addresses_.add(identity(seen.data) + static_cast<int64_t>(seen.byte_offset));
    metadata_.add(int64_t{seen.device.device_type} << 32 | seen.device.device_id);
    metadata_.add(int64_t{seen.dtype.code} << 24 | int64_t{seen.dtype.bits} << 16 | conjugated << 1 | negated);
    metadata_.add(seen.ndim);
    for (int32_t i = 0; i < seen.ndim; ++i) metadata_.add(seen.shape[i]);
    for (int32_t i = 0; i < seen.ndim; ++i) metadata_.add(seen.strides[i]);
    if (place != nullptr) place->note(seen);
    return 1;
  }

  // A new tuple; nullptr and an exception if there is no memory.
  PyObject* to_tuple() {
    const Reference addresses(addresses_.to_bytes()), metadata(metadata_.to_bytes());
    if (addresses == nullptr || metadata == nullptr) return nullptr;
    return PyTuple_Pack(2, addresses.get(), metadata.get());
  }

 private:
  static PyObject* part(PyObject* known, Py_ssize_t i) {
    return i < PyTuple_Size(known) ? PyTuple_GetItem(known, i) : Py_None;
  }

  const PyTypeObject* type_ = nullptr;  // of the last tensor
  Answers addresses_, metadata_;
};

// What a function returns where a tensor could not be described (0): None, so that Python asks it; or the exception
// (-1).
PyObject* give_up(int described) {
  const bool is_refusal = PyErr_Occurred() == nullptr || PyErr_ExceptionMatches(PyExc_Exception);  // no Ctrl-C
  if (described < 0 || !is_refusal) return nullptr;
  PyErr_Clear();
  Py_RETURN_NONE;
}

const DLPackExchangeAPI* get_api(PyObject* capsule) {
  return static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
}

// describe(tensors: list, known: tuple, Tensor: type, exchange_api) -> (bytes, bytes) or None: their addresses and
// their metadata, each the object in `known` where nothing has changed. None: ask them in Python.
PyObject* describe(PyObject*, PyObject* arguments) {
  PyObject *tensors = nullptr, *known = nullptr, *type = nullptr, *capsule = nullptr;
  if (!PyArg_ParseTuple(arguments, "O!O!O!O:describe", &PyList_Type, &tensors, &PyTuple_Type, &known, &PyType_Type,
                        &type, &capsule)) {
    return nullptr;
  }
  const DLPackExchangeAPI* api = get_api(capsule);
  if (api == nullptr) return nullptr;
  try {
    const Interface interface(type, api);
    if (interface.view == nullptr) return give_up(0);
    Description description(known);
    for (Py_ssize_t i = 0; i < PyList_Size(tensors); ++i) {
      const int described = description.add(PyList_GetItem(tensors, i), interface);
      if (described != 1) return give_up(described);
    }
    return description.to_tuple();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// The places of a parameter and its gradient.
struct Pair {
  Place param, grad;
  const void* grad_object;

  FASTSAM_ALWAYS_INLINE void prefetch() const {
    __builtin_prefetch(grad_object);
    param.prefetch();
    grad.prefetch();
  }
};

static_assert(sizeof(Pair) == 40, "as many bytes as fastsam/tables/signature.py gives each parameter");

constexpr Py_ssize_t kAhead = 6;

// find_storage_word(tensor, address: int, exchange_api) -> None: tells read_grads() where tensor objects have the
// address of their storage object, by one of one dimension whose storage object is at `address`.
PyObject* find_storage_word(PyObject*, PyObject* arguments) {
  PyObject *tensor = nullptr, *capsule = nullptr;
  long long address = 0;
  if (!PyArg_ParseTuple(arguments, "OLO:find_storage_word", &tensor, &address, &capsule)) return nullptr;
  const DLPackExchangeAPI* api = get_api(capsule);
  if (api == nullptr) return nullptr;
  DLTensor seen;
  if (api->header.version.major != DLPACK_MAJOR_VERSION || api->dltensor_from_py_object_no_sync == nullptr ||
      api->dltensor_from_py_object_no_sync(tensor, &seen) != 0 || !is_inline(seen)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  for (int word = 1; word < 8; ++word) {
    if (seen.shape[-word] == address) storage_word = word;
  }
  Py_RETURN_NONE;
}

// read_grads(params: list, known_params: tuple, known_grads: tuple, places: bytearray, Tensor: type, exchange_api)
// -> (grads: list, (bytes, bytes), (bytes, bytes)) or None: the gradients, and what describe() says of the parameters
// and of them. `places`: 40 bytes for each parameter, zeros at first, then handed back as they are.
PyObject* read_grads(PyObject*, PyObject* arguments) {
  PyObject *params = nullptr, *known_params = nullptr, *known_grads = nullptr, *places = nullptr;
  PyObject *type = nullptr, *capsule = nullptr;
  if (!PyArg_ParseTuple(arguments, "O!O!O!O!O!O:read_grads", &PyList_Type, &params, &PyTuple_Type, &known_params,
                        &PyTuple_Type, &known_grads, &PyByteArray_Type, &places, &PyType_Type, &type, &capsule)) {
    return nullptr;
  }
  const DLPackExchangeAPI* api = get_api(capsule);
  if (api == nullptr) return nullptr;
  const Py_ssize_t count = PyList_Size(params);
  if (PyByteArray_Size(places) != count * static_cast<Py_ssize_t>(sizeof(Pair))) {
    PyErr_SetString(PyExc_ValueError, "read_grads() takes 40 bytes for each parameter");
    return nullptr;
  }
  try {
    const Reference name(PyUnicode_InternFromString("grad")), grads(PyList_New(count));
    if (name == nullptr || grads == nullptr) return nullptr;
    auto* pair = reinterpret_cast<Pair*>(PyByteArray_AsString(places));
    const Interface interface(type, api);
    if (interface.view == nullptr) return give_up(0);
    Description mine(known_params), theirs(known_grads);
    for (Py_ssize_t i = 0; i < count; ++i, ++pair) {
      if (i + 2 * kAhead < count) __builtin_prefetch(PyList_GetItem(params, i + 2 * kAhead));
      if (i + kAhead < count) pair[kAhead].prefetch();
      // To get the gradient may run Python code, which may change the list.
      const Reference param(Py_XNewRef(PyList_GetItem(params, i)));
      PyObject* grad = param == nullptr ? nullptr : PyObject_GetAttr(param.get(), name.get());
      if (grad == nullptr || PyList_SetItem(grads.get(), i, grad) != 0) return nullptr;
      pair->grad_object = grad;
      int described = mine.add(param.get(), interface, &pair->param);
      if (described == 1) described = theirs.add(grad, interface, &pair->grad);
      if (described != 1) return give_up(described);
    }
    const Reference first(mine.to_tuple()), second(theirs.to_tuple());
    if (first == nullptr || second == nullptr) return nullptr;
    return PyTuple_Pack(3, grads.get(), first.get(), second.get());
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
                         {"read_grads", read_grads, METH_VARARGS, nullptr},
                         {"find_storage_word", find_storage_word, METH_VARARGS, nullptr},
                         {"identities", identities, METH_O, nullptr},
                         {"nested_identities", nested_identities, METH_VARARGS, nullptr},
                         {"is_unchanged", is_unchanged, METH_O, nullptr},
                         {"unwatch", unwatch, METH_O, nullptr},
                         {"spec", fastsam::spec, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&definition); }
