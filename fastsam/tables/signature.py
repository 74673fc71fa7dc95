"""What every step looks at for thousands of tensors: where they are, how they look, whether they are the same ones."""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _find(name: str) -> Any:
    """A function of the compiled extension, or None."""
    try:
        return getattr(importlib.import_module("fastsam._C"), name)
    except (ImportError, AttributeError):
        return None


# Asking in Python takes longer than the arithmetic on a small model. Where nothing is compiled, or where torch lacks
# DLPack's interface for C (a PyCapsule of functions), plain Python does the same.
_exchange_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_describe = _find("describe") if type(_exchange_api).__name__ == "PyCapsule" else None
_identities = _find("identities")
_nested_identities = _find("nested_identities")

_grad = attrgetter("grad")


class Description(NamedTuple):
    """Where some tensors are and how they look, to be compared with another time's."""

    addresses: bytes
    """Of each one's first element, as int64s; 0 for None and for a tensor that has none (a sparse one)."""
    looks: Any
    """Devices, dtypes, shapes, strides."""


def describe(tensors: list[Tensor] | list[Tensor | None]) -> Description:
    """Where ``tensors`` are, and how they look; None looks like no tensor."""
    if _describe is not None:
        found = _describe(tensors, Tensor, _exchange_api)
        if found is not None:
            return Description(*found)
    looks = [None if t is None else _look(t) for t in tensors]
    return Description(array("q", [_address(t) for t in tensors]).tobytes(), looks)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.layout is not torch.strided else tensor.data_ptr()


def _look(t: Tensor) -> tuple[Any, ...]:
    strides = t.stride() if t.layout is torch.strided else t.layout
    return t.dtype, t.device, t.shape, strides, t.is_conj(), t.is_neg()


def identities(objects: Iterable[Any]) -> bytes:
    """Which objects an iterable holds, as int64s; they mean something only while the objects live."""
    objects = objects if isinstance(objects, list) else list(objects)
    return _identities(objects) if _identities is not None else array("q", map(id, objects)).tobytes()


def nested_identities(entries: Mapping[Any, dict[str, Any]], names: tuple[str, ...]) -> bytes:
    """Which keys, dicts and values under ``names`` a dict of dicts holds; 0 for a name that a dict lacks."""
    if _nested_identities is not None and isinstance(entries, dict):
        return _nested_identities(entries, names)
    numbers = array("q")
    for key, inner in entries.items():
        has = inner if isinstance(inner, dict) else {}
        numbers.extend([id(key), id(inner), *(id(has[name]) if name in has else 0 for name in names)])
    return numbers.tobytes()


_NO_ADDRESS = bytes(8)

# Parameters that are looked at together: few enough that all that is asked of them finds them in the cache.
BLOCK = 256


class ParameterBlock:
    """A run of a table's parameters: how they and their gradients looked when last looked at closely."""

    def __init__(self, start: int, params: list[Tensor]) -> None:
        self.start, self.stop = start, start + len(params)
        self.params = params
        self._description = describe(params)
        self._usual: Any = None
        self._without_address = 0

    def is_unchanged(self) -> bool:
        """Whether every parameter is where, and what, it was at the start."""
        return describe(self.params) == self._description

    def read_grads(self) -> tuple[list[Tensor | None], bytes | None]:
        """The present gradients; and their addresses, if they look as usual."""
        grads = list(map(_grad, self.params))
        addresses, looks = describe(grads)
        # A gradient without an address must be copied; no two addresses in a row have eight zero bytes between them.
        is_usual = looks == self._usual and addresses.count(_NO_ADDRESS) == self._without_address
        return grads, addresses if is_usual else None

    def expect_grads(self, grads: list[Tensor | None], *, usable: bool) -> None:
        """Takes ``grads`` for usual, if they could be used as they are."""
        addresses, looks = describe(grads)
        self._usual = looks if usable else None
        self._without_address = addresses.count(_NO_ADDRESS)
