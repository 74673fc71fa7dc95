// The functions of fastsam._C that are not python.cpp's own.
#pragma once

#include <Python.h>

namespace fastsam {

// spec() -> dict
PyObject* spec(PyObject*, PyObject*);

// describe(tensors: list, known: tuple, Tensor: type, exchange_api) -> (bytes, bytes) or None: the addresses and the
// metadata of tensors, each the object in `known` where it is the same. None: DLPack cannot describe them all.
PyObject* describe(PyObject*, PyObject* arguments);

// read_grads(params: list, known_params: tuple, known_grads: tuple, hints: bytearray, Tensor: type, exchange_api)
// -> (grads: list, (bytes, bytes), (bytes, bytes)) or None: the gradients, and what describe() returns for the
// parameters and for them. `hints`: 40 bytes for each parameter, zeros at first, then as the last call left them.
PyObject* read_grads(PyObject*, PyObject* arguments);

// learn_storage_offset(tensor, address: int, exchange_api) -> None: lets read_grads() find the storage objects of
// tensors by an example of one dimension, whose storage object is at `address`.
PyObject* learn_storage_offset(PyObject*, PyObject* arguments);

}  // namespace fastsam
