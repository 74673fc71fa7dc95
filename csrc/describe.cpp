// What a step compares of tensors, by DLPack's C interface: addresses and metadata of parameters and gradients.
//
// Comparing thousands of small tensors is bound by cache misses. What is read of one is therefore prefetched, from
// where it was in the step before.
#include <Python.h>

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "python.h"

// torch refuses its copy of DLPack's header under its own stable ABI. DLPack has a version of its own, asked below.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

// Without this, GCC takes a function that only prefetches for one without an effect, and drops its calls.
#define FASTSAM_ALWAYS_INLINE __attribute__((always_inline))

namespace fastsam {
namespace {

struct Release {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};

// An owned reference; nullptr where there is none.
using Reference = std::unique_ptr<PyObject, Release>;

// A method without arguments that returns a bool. Looked up once for all tensors: that takes as long as calling it.
class Predicate {
 public:
  Predicate(PyObject* type, const char* method) : function_(PyObject_GetAttrString(type, method)) {}

  // 0 or 1; -1 and an exception if the call fails.
  int operator()(PyObject* tensor) const {
    if (function_ == nullptr) return -1;
    const Reference result(PyObject_CallFunctionObjArgs(function_.get(), tensor, nullptr));
    return result == nullptr ? -1 : PyObject_IsTrue(result.get());
  }

 private:
  Reference function_;
};

// A sequence of int64, usually the same as at the last call: it is compared with that one, and stored only from the
// first difference on.
class ComparedWords {
 public:
  // `known`: the bytes of the last call. Anything else: there are none.
  explicit ComparedWords(PyObject* known) : known_(known) {
    if (!PyBytes_Check(known)) return;
    begin_ = next_ = reinterpret_cast<const int64_t*>(PyBytes_AsString(known));
    end_ = begin_ + PyBytes_Size(known) / static_cast<Py_ssize_t>(sizeof(int64_t));
  }

  void add(int64_t word) {
    if (next_ != end_ && *next_ == word) {
      ++next_;
    } else {
      copy_equal_part();
      words_.push_back(word);
    }
  }

  // A new reference, to `known` itself if nothing differs; nullptr and an exception if there is no memory.
  PyObject* to_bytes() {
    if (begin_ != nullptr && next_ == end_) {
      Py_INCREF(known_);
      return known_;
    }
    copy_equal_part();
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words_.data()),
                                     static_cast<Py_ssize_t>(words_.size() * sizeof(int64_t)));
  }

 private:
  // At the first difference; later calls do nothing.
  void copy_equal_part() {
    if (next_ == nullptr) return;
    words_.assign(begin_, next_);
    begin_ = next_ = end_ = nullptr;
  }

  PyObject* known_;
  const int64_t *begin_ = nullptr, *next_ = nullptr, *end_ = nullptr;
  std::vector<int64_t> words_;
};

// torch's function that fills in a DLTensor. nullptr: its DLPack has another version; or, with an exception, the
// capsule is none of DLPack's.
DLPackDLTensorFromPyObjectNoSync get_view(PyObject* capsule) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  const bool is_usable = api != nullptr && api->header.version.major == DLPACK_MAJOR_VERSION;
  return is_usable ? api->dltensor_from_py_object_no_sync : nullptr;
}

// How many words before its sizes a tensor object has the address of its storage object; 0: unknown.
int storage_offset = 0;

// Whether sizes and strides are in the tensor object, which has room for five of each, one after the other. Longer ones
// are elsewhere, and further apart.
bool is_inline(const DLTensor& seen) { return seen.strides == seen.shape + 5; }

// Where the objects behind a tensor were at the last call. A wrong address costs a useless prefetch, nothing else; they
// are numbers because pointers to what may be gone have no arithmetic.
struct Hint {
  uintptr_t sizes, storage;

  void note(const DLTensor& seen) {
    sizes = reinterpret_cast<uintptr_t>(seen.shape);
    if (storage_offset > 0 && is_inline(seen)) storage = static_cast<uintptr_t>(seen.shape[-storage_offset]);
  }

  FASTSAM_ALWAYS_INLINE void prefetch() const {
    for (const uintptr_t line : {sizes - 64, sizes, sizes + 64, sizes + 128, storage, storage + 63}) {
      __builtin_prefetch(reinterpret_cast<const void*>(line));
    }
  }
};

struct ParameterHint {
  Hint param, grad;
  const void* grad_object;

  FASTSAM_ALWAYS_INLINE void prefetch() const {
    __builtin_prefetch(grad_object);
    param.prefetch();
    grad.prefetch();
  }
};

static_assert(sizeof(ParameterHint) == 40, "fastsam/tables/signature.py allocates 40 bytes for each parameter");

// How many parameters ahead they are prefetched.
constexpr Py_ssize_t kAhead = 6;

// How a tensor is described.
struct Functions {
  PyTypeObject* tensor_type;
  DLPackDLTensorFromPyObjectNoSync view;
  Predicate is_conj, is_neg;

  Functions(PyObject* type, DLPackDLTensorFromPyObjectNoSync view)
      : tensor_type(reinterpret_cast<PyTypeObject*>(type)),
        view(view),
        is_conj(type, "is_conj"),
        is_neg(type, "is_neg") {}
};

// The addresses of tensors (0 for None), and their metadata: device, dtype, shape, strides.
class Description {
 public:
  // `known`: a tuple, the description of the last call.
  explicit Description(PyObject* known) : addresses_(part(known, 0)), metadata_(part(known, 1)) {}

  // 1; 0 if DLPack cannot describe a tensor (a sparse one, say); -1 and an exception if it is no tensor.
  int add(PyObject* tensor, const Functions& functions, Hint* hint = nullptr) {
    if (tensor == Py_None) {
      addresses_.add(0);
      metadata_.add(-1);
      return 1;
    }
    if (Py_TYPE(tensor) != last_type_ && !PyType_IsSubtype(Py_TYPE(tensor), functions.tensor_type)) {
      PyErr_SetString(PyExc_TypeError, "expected tensors");
      return -1;
    }
    last_type_ = Py_TYPE(tensor);
    DLTensor seen;
    if (functions.view(tensor, &seen) != 0) return 0;
    int64_t elements = 1;
    for (int32_t i = 0; i < seen.ndim; ++i) elements *= seen.shape[i];
    // DLPack knows of no lazy conjugation or negation. A lazily negated real tensor is the imaginary part of a complex
    // one, which the strides tell, unless it is a single element.
    const bool is_complex = seen.dtype.code == kDLComplex;
    const int conjugated = is_complex ? functions.is_conj(tensor) : 0;
    const int negated = conjugated >= 0 && (is_complex || elements == 1) ? functions.is_neg(tensor) : 0;
    if (conjugated < 0 || negated < 0) return 0;
    addresses_.add(static_cast<int64_t>(reinterpret_cast<intptr_t>(seen.data)) +
                   static_cast<int64_t>(seen.byte_offset));
    metadata_.add(int64_t{seen.device.device_type} << 32 | seen.device.device_id);
    metadata_.add(int64_t{seen.dtype.code} << 24 | int64_t{seen.dtype.bits} << 16 | conjugated << 1 | negated);
    metadata_.add(seen.ndim);
    for (int32_t i = 0; i < seen.ndim; ++i) metadata_.add(seen.shape[i]);
    for (int32_t i = 0; i < seen.ndim; ++i) metadata_.add(seen.strides[i]);
    if (hint != nullptr) hint->note(seen);
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

  const PyTypeObject* last_type_ = nullptr;
  ComparedWords addresses_, metadata_;
};

// The result where a tensor is not described: nullptr if that is an error (-1, or a Ctrl-C in a Python method), None if
// Python is to describe it (0).
PyObject* give_up(int described) {
  const bool is_interrupted = PyErr_Occurred() != nullptr && !PyErr_ExceptionMatches(PyExc_Exception);
  if (described < 0 || is_interrupted) return nullptr;
  PyErr_Clear();
  Py_RETURN_NONE;
}

}  // namespace

PyObject* learn_storage_offset(PyObject*, PyObject* arguments) {
  PyObject *tensor = nullptr, *capsule = nullptr;
  long long address = 0;
  if (!PyArg_ParseTuple(arguments, "OLO:learn_storage_offset", &tensor, &address, &capsule)) return nullptr;
  const auto view = get_view(capsule);
  if (view == nullptr && PyErr_Occurred() != nullptr) return nullptr;
  DLTensor seen;
  if (view == nullptr || view(tensor, &seen) != 0 || !is_inline(seen)) return give_up(0);
  for (int offset = 1; offset < 8; ++offset) {
    if (seen.shape[-offset] == address) storage_offset = offset;
  }
  Py_RETURN_NONE;
}

PyObject* describe(PyObject*, PyObject* arguments) {
  PyObject *tensors = nullptr, *known = nullptr, *type = nullptr, *capsule = nullptr;
  if (!PyArg_ParseTuple(arguments, "O!O!O!O:describe", &PyList_Type, &tensors, &PyTuple_Type, &known, &PyType_Type,
                        &type, &capsule)) {
    return nullptr;
  }
  const auto view = get_view(capsule);
  if (view == nullptr) return give_up(PyErr_Occurred() == nullptr ? 0 : -1);
  try {
    const Functions functions(type, view);
    Description description(known);
    for (Py_ssize_t i = 0; i < PyList_Size(tensors); ++i) {
      const Reference tensor(Py_NewRef(PyList_GetItem(tensors, i)));  // is_neg() may run Python code
      const int described = description.add(tensor.get(), functions);
      if (described != 1) return give_up(described);
    }
    return description.to_tuple();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

PyObject* read_grads(PyObject*, PyObject* arguments) {
  PyObject *params = nullptr, *known_params = nullptr, *known_grads = nullptr, *hints = nullptr;
  PyObject *type = nullptr, *capsule = nullptr;
  if (!PyArg_ParseTuple(arguments, "O!O!O!O!O!O:read_grads", &PyList_Type, &params, &PyTuple_Type, &known_params,
                        &PyTuple_Type, &known_grads, &PyByteArray_Type, &hints, &PyType_Type, &type, &capsule)) {
    return nullptr;
  }
  const auto view = get_view(capsule);
  if (view == nullptr) return give_up(PyErr_Occurred() == nullptr ? 0 : -1);
  const Py_ssize_t count = PyList_Size(params);
  if (PyByteArray_Size(hints) != count * static_cast<Py_ssize_t>(sizeof(ParameterHint))) {
    PyErr_SetString(PyExc_ValueError, "read_grads() takes 40 bytes of hints for each parameter");
    return nullptr;
  }
  try {
    const Reference name(PyUnicode_InternFromString("grad")), grads(PyList_New(count));
    if (name == nullptr || grads == nullptr) return nullptr;
    auto* hint = reinterpret_cast<ParameterHint*>(PyByteArray_AsString(hints));
    const Functions functions(type, view);
    Description of_params(known_params), of_grads(known_grads);
    for (Py_ssize_t i = 0; i < count; ++i, ++hint) {
      // A subclass's grad may run Python code, which may shorten the list.
      if (i + 2 * kAhead < PyList_Size(params)) __builtin_prefetch(PyList_GetItem(params, i + 2 * kAhead));
      if (i + kAhead < count) hint[kAhead].prefetch();
      const Reference param(Py_XNewRef(PyList_GetItem(params, i)));
      PyObject* grad = param == nullptr ? nullptr : PyObject_GetAttr(param.get(), name.get());
      if (grad == nullptr || PyList_SetItem(grads.get(), i, grad) != 0) return nullptr;
      hint->grad_object = grad;
      int described = of_params.add(param.get(), functions, &hint->param);
      if (described == 1) described = of_grads.add(grad, functions, &hint->grad);
      if (described != 1) return give_up(described);
    }
    const Reference first(of_params.to_tuple()), second(of_grads.to_tuple());
    if (first == nullptr || second == nullptr) return nullptr;
    return PyTuple_Pack(3, grads.get(), first.get(), second.get());
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

}  // namespace fastsam
