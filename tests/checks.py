"""Comparisons that mean what they say: bits, the design's tolerance, one rounding, memory around a tensor."""

import functools

import torch
from registry import DTYPE_IDS as DTYPE_IDS
from registry import DTYPES as DTYPES
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What the design computes in (invariant 9)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_real(tensor: Tensor) -> Tensor:
    """The tensor itself, or a complex one as pairs of reals."""
    return torch.view_as_real(tensor.resolve_conj().resolve_neg()) if tensor.is_complex() else tensor.resolve_neg()


def bits(tensor: Tensor) -> Tensor:
    """The elements' bits: -0.0 is not 0.0, and a NaN is itself."""
    real = as_real(tensor.detach()).contiguous()
    return real.view(_INTEGERS[real.element_size()])


def assert_same_bits(actual, expected, what="") -> None:
    """Tensors, or lists of them (None is only itself)."""
    if isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected), what
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(one, other, f"{what}[{i}]")
        return
    if actual is None or expected is None:
        assert actual is expected, what
        return
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    different = bits(actual) != bits(expected)
    assert not different.any(), f"{what}: {int(different.sum())} of {different.numel()} differ in bits"


def has_torchs_bits(backend: str, device: torch.device) -> bool:
    """Whether a fused base's updates are promised to be torch.optim's bit for bit.

    On CUDA even ``reference`` does not wait for Adam's step counts: its last operation takes them as a tensor.
    """
    return backend == "reference" and device.type == "cpu"


def assert_all_close(actual, expected, **tolerance) -> None:
    """Lists of tensors, by ``torch.testing.assert_close``."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), **tolerance)


def assert_within(actual, expected, start, what="", term=None, *, stochastic=False) -> None:
    """Invariant 3: within ``4 * eps * max(|w|, |dw|)``, element by element, of what is expected from ``start``.

    ``eps`` is that of the arithmetic. A dtype narrower than that may differ by one rounding of the expected value more,
    to nearest or (``stochastic``) to either side.
    ``term``, if given, is what ``dw`` is a sum of: where it cancels, the sum is as exact as its terms.
    """
    if isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected) == len(start), what
        for i, (one, other, first) in enumerate(zip(actual, expected, start, strict=True)):
            assert_within(one, other, first, f"{what}[{i}]", stochastic=stochastic)
        return
    assert actual.shape == expected.shape == start.shape, what
    dtype = as_real(actual).dtype
    got, want, first = (as_real(t.detach()).to(torch.float64) for t in (actual, expected, start))
    size = torch.maximum(first.abs(), (want - first).abs())
    if term is not None:
        size = torch.maximum(size, as_real(term).to(torch.float64).abs())
    allowed = 4 * torch.finfo(arithmetic(dtype)).eps * size
    if dtype != arithmetic(dtype):
        info = torch.finfo(dtype)
        spacings = 1.0 if stochastic else 0.5
        allowed = allowed + spacings * info.eps * (want.abs() + info.smallest_normal)
    wrong = ~((got - want).abs() <= allowed)  # a NaN is wrong
    if wrong.any():
        at = int(wrong.flatten().nonzero()[0])
        values = [float(t.flatten()[at]) for t in (got, want, first, allowed)]
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements; the first, at {at}: "
            "got {!r}, expected {!r} from {!r}, allowed {:.3g}".format(*values)
        )


def values(shape, dtype, device="cpu", seed=0) -> Tensor:
    """Random numbers of both signs, none of them tiny: beside a tiny one, rounding errors are all there is."""
    return _random_numbers(tuple(shape), dtype.is_complex, seed).to(device, dtype, copy=True)


@functools.lru_cache(maxsize=512)
def _random_numbers(shape, is_complex, seed) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, dtype=torch.complex128 if is_complex else torch.float64, generator=generator)
    return numbers + numbers.sgn() / 4


class Canaries:
    """Tensors in the middle of memory that nobody else may write to."""

    MARGIN = 64  # elements on either side, a multiple of 64 bytes

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Tensor, Tensor]] = []

    def around(self, tensor: Tensor, *, offset: int = 0, strides: tuple[int, ...] | None = None) -> Tensor:
        """A copy of ``tensor`` that starts ``offset`` elements after an aligned address; NaN lies all around it."""
        strides = tensor.stride() if strides is None else strides
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True) if size > 0)
        start = self.MARGIN + offset
        buffer = torch.full(
            (start + reach + 1 + self.MARGIN,), torch.nan, dtype=tensor.dtype, device=tensor.device, requires_grad=False
        )
        outside = torch.ones_like(buffer, dtype=torch.bool)
        placed = buffer.as_strided(tensor.shape, strides, start)
        outside.as_strided(tensor.shape, strides, start).fill_(False)
        placed.copy_(tensor.detach())
        self._buffers.append((buffer, outside, buffer.clone()))
        return placed.detach()

    def assert_alive(self) -> None:
        for buffer, outside, original in self._buffers:
            assert_same_bits(buffer[outside], original[outside], "memory around a tensor")


def assert_nothing_written_between(tensors: list[Tensor], poison_bits: Tensor) -> None:
    """That a shared allocation still holds what :func:`poison_allocation` put between its tensors."""
    memory = _allocation(tensors[0])
    outside = torch.ones_like(memory, dtype=torch.bool)
    for tensor in tensors:
        outside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    assert_same_bits(memory[outside], poison_bits[outside], "padding between tensors")


def poison_allocation(tensor: Tensor) -> Tensor:
    """Fills everything that lies in the allocation of ``tensor`` with NaN, and returns a copy of that."""
    return _allocation(tensor).fill_(torch.nan).clone()


def _allocation(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
