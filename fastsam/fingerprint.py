"""What every step looks at for thousands of tensors: where they are, how they look, whether they are the same ones."""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


# Python's own way to ask takes longer than the arithmetic on a small model. None of these is a public name of torch, or
# always compiled: where one is missing, plain Python does the same.
_TensorGuards = _find("torch._C._dynamo.guards", "TensorGuards")  # dtype, device, shape and strides in one call
_data_ptr = _find("torch._C._dynamo.guards", "_torchinductor_pyobject_tensor_data_ptr")  # a function for C callers
_addresses = _find("fastsam._C", "addresses") if _data_ptr is not None else None
_identities = _find("fastsam._C", "identities")
_nested_identities = _find("fastsam._C", "nested_identities")


def addresses(tensors: list[Tensor] | list[Tensor | None]) -> bytes:
    """Where the first element of each tensor is, as int64s; 0 for None."""
    if _addresses is not None:
        return _addresses(tensors, _data_ptr)
    return array("q", [0 if t is None else t.data_ptr() for t in tensors]).tobytes()


def identities(objects: list[Any]) -> bytes:
    """Which objects a list holds, as int64s; they mean something only while the objects live."""
    return _identities(objects) if _identities is not None else array("q", map(id, objects)).tobytes()


def nested_identities(entries: Mapping[Any, dict[str, Any]], names: tuple[str, ...]) -> bytes:
    """Which keys, dicts and values under ``names`` a dict of dicts holds; 0 for a name that a dict lacks."""
    if _nested_identities is not None and isinstance(entries, dict):
        return _nested_identities(entries, names)
    numbers = array("q")
    for key, inner in entries.items():
        numbers.extend([id(key), id(inner), *(id(inner[name]) if name in inner else 0 for name in names)])
    return numbers.tobytes()


class Fingerprint:
    """What some tensors looked like (dtype, device, shape, strides), to be compared with others later."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._expected = _describe(tensors)
        self._guards = _guards(tensors)

    def matches(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether ``tensors`` look the same, one by one; None looks like no tensor."""
        if self._guards is not None and self._guards.check(*tensors):
            return True
        present = [t for t in tensors if t is not None]
        if len(present) < len(tensors) or _describe(present) != self._expected:
            return False
        # The guards also compare what does not matter here, such as requires_grad and an autocast block.
        self._guards = _guards(present)
        return True


def _describe(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [
        (t.dtype, t.device, t.shape, t.stride() if t.layout is torch.strided else t.layout, t.is_conj(), t.is_neg())
        for t in tensors
    ]


def _guards(tensors: Sequence[Tensor]) -> Any:
    if _TensorGuards is None or not tensors or any(t.layout is not torch.strided for t in tensors):
        return None
    return _TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    )


# Parameters that are looked at together: few enough that all that is asked of them finds them in the cache.
BLOCK = 256


class ParameterBlock:
    """A run of a table's parameters: what they and their gradients looked like when last looked at closely."""

    def __init__(self, start: int, params: list[Tensor]) -> None:
        self.start, self.stop = start, start + len(params)
        self.params = params
        self._addresses, self._look = addresses(params), Fingerprint(params)
        self._present: list[int] = []
        self._grad_look: Fingerprint | None = None

    def is_unchanged(self) -> bool:
        """Whether every parameter is where, and what, it was at the start."""
        return addresses(self.params) == self._addresses and self._look.matches(self.params)

    def has_usual_grads(self, grads: list[Tensor | None]) -> bool:
        """The steady state: the same parameters have gradients, and these can be used as they are."""
        if self._grad_look is None:
            return False
        if len(self._present) == len(grads):
            return self._grad_look.matches(grads)
        present = [i for i, grad in enumerate(grads) if grad is not None]
        return present == self._present and self._grad_look.matches([grads[i] for i in present])

    def expect_grads(self, grads: list[Tensor | None], laid_out: list[Tensor | None]) -> None:
        """Takes ``grads`` for usual, if they could be used as they are (``laid_out``: what is used)."""
        self._present = [i for i, grad in enumerate(grads) if grad is not None]
        usable = all(map(is_, grads, laid_out))
        self._grad_look = Fingerprint([grad for grad in grads if grad is not None]) if usable else None
