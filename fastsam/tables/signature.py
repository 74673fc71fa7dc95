"""What every step compares for thousands of tensors: their addresses, their metadata, their identities."""

from __future__ import annotations

import importlib
import weakref
from array import array
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.distributed import is_distributed, local_grad, local_of


def _find(name: str) -> Any:
    """A function of the compiled extension, or None."""
    try:
        return getattr(importlib.import_module("fastsam._C"), name)
    except (ImportError, AttributeError):
        return None


# In Python, this takes longer than the arithmetic of a small model. The Python versions below are used where nothing is
# compiled, or where torch lacks DLPack's C interface (a PyCapsule of functions).
_exchange_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_has_api = type(_exchange_api).__name__ == "PyCapsule"
_describe = _find("describe") if _has_api else None
_read_grads = _find("read_grads") if _has_api else None
if _read_grads is not None:
    _probe = torch.empty(1, device="cpu")
    _find("learn_storage_offset")(_probe, _probe.untyped_storage()._cdata, _exchange_api)
    del _probe
_identities = _find("identities")
_nested_identities = _find("nested_identities")
_is_unchanged = _find("is_unchanged")
_unwatch = _find("unwatch")

_grad = attrgetter("grad")


class Description(NamedTuple):
    """Addresses and metadata of a list of tensors, to be compared with an earlier description."""

    addresses: bytes
    """Of each tensor's first element, as int64; 0 for None and for a tensor without an address (a sparse one)."""
    metadata: Any
    """Devices, dtypes, shapes and strides; those of None differ from those of every tensor."""


_NOTHING = Description(b"", None)


def describe(tensors: list[Tensor] | list[Tensor | None], known: tuple[bytes, Any] = _NOTHING) -> Description:
    """The addresses and the metadata of ``tensors``.

    Args:
        tensors: the tensors.
        known: their description at another time: what is still the same is compared faster, and is the same object.
    """
    if _describe is not None:
        found = _describe(tensors, known, Tensor, _exchange_api)
        if found is not None:
            return Description(*found)
    metadata = [None if t is None else _metadata(t) for t in tensors]
    return Description(array("q", [_address(t) for t in tensors]).tobytes(), metadata)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.layout is not torch.strided else tensor.data_ptr()


def _metadata(t: Tensor) -> tuple[Any, ...]:
    strides = t.stride() if t.layout is torch.strided else t.layout
    return t.dtype, t.device, t.shape, strides, t.is_conj(), t.is_neg()


def identities(objects: Iterable[Any]) -> bytes:
    """The identities of the objects in an iterable, as int64; they are valid only while the objects are alive."""
    objects = objects if isinstance(objects, list) else list(objects)
    return _identities(objects) if _identities is not None else array("q", map(id, objects)).tobytes()


def nested_identities(entries: Mapping[Any, dict[str, Any]], names: tuple[str, ...]) -> bytes:
    """The identities of the keys, the dicts and their values under ``names``; 0 for a name that a dict lacks."""
    if _nested_identities is not None and isinstance(entries, dict):
        return _nested_identities(entries, names)
    numbers = array("q")
    for key, inner in entries.items():
        has = inner if isinstance(inner, dict) else {}
        numbers.extend([id(key), id(inner), *(id(has[name]) if name in has else 0 for name in names)])
    return numbers.tobytes()


class Watch:
    """Detects whether tensors have changed address, dtype, shape or strides.

    The compiled version holds a reference to each, which :func:`torch.utils.swap_tensors` refuses, so this is not for
    parameters.

    Args:
        tensors: strided tensors with memory, neither lazily conjugated nor negated.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._number: int | None = None
        if _is_unchanged is not None and all(type(tensor) is Tensor for tensor in tensors):
            self._number = torch.ops.fastsam.watch(tensors)
            weakref.finalize(self, _unwatch, self._number).atexit = False
        else:
            self._tensors, self._description = tensors, describe(tensors)

    def is_unchanged(self) -> bool:
        """Whether none has changed since the construction."""
        if self._number is not None:
            return bool(_is_unchanged(self._number))
        return describe(self._tensors) == self._description


_NO_ADDRESS = bytes(8)

# What the compiled function keeps for prefetching, in bytes for each parameter.
_HINT = 40


class ParameterReader:
    """Reads the gradients of parameters, and detects whether anything but the parameters' values has changed.

    Args:
        params: the parameters.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self._params = params
        # What differs for DTensors takes as long as all the rest.
        self._is_local = not any(map(is_distributed, params))
        self._hints = bytearray(_HINT * len(params))
        self._description = describe(self._locals())
        self._grads: tuple[bytes, Any] = _NOTHING
        self._usable: Any = None
        self._without_address = 0
        self._checked = b""

    def is_unchanged(self) -> bool:
        """Whether every parameter has the address and the metadata that it had at the start."""
        return describe(self._locals(), self._description) == self._description

    def read_grads(self) -> tuple[list[Tensor | None], bytes | None] | None:
        """The present gradients; and their addresses, if their metadata are the expected ones.

        Addresses that are those of the last time are the same object. None: a parameter has changed.
        """
        grads, params, self._grads = self._read()
        if params != self._description:
            return None
        addresses, metadata = self._grads
        # A gradient without an address must be copied; no two addresses in a row have eight zero bytes between them.
        is_expected = metadata == self._usable
        if is_expected and addresses is not self._checked:
            is_expected = addresses.count(_NO_ADDRESS) == self._without_address
            self._checked = addresses if is_expected else b""
        return grads, addresses if is_expected else None

    def expect_grads(self, *, usable: bool) -> None:
        """Expects the metadata of the gradients that were read last, if these could be used without a copy."""
        addresses, metadata = self._grads
        self._usable = metadata if usable else None
        self._without_address = addresses.count(_NO_ADDRESS)
        self._checked = b""

    def _locals(self) -> list[Tensor]:
        return self._params if self._is_local else list(map(local_of, self._params))

    def _read(self) -> tuple[list[Tensor | None], Any, Any]:
        """The gradients, and the descriptions of the parameters and of them."""
        if self._is_local and _read_grads is not None:
            known = self._description, self._grads
            found = _read_grads(self._params, *known, self._hints, Tensor, _exchange_api)
            if found is not None:
                return found
        grads = list(map(_grad if self._is_local else local_grad, self._params))
        return grads, describe(self._locals(), self._description), describe(grads, self._grads)
