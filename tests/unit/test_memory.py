"""How tensors lie in memory: which are dense, which share an order, where views of one allocation start."""

import itertools
import math

import pytest
import torch
from checks import DTYPE_IDS, DTYPES, assert_same_bits, values
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsam.tables import memory as layouts
from fastsam.tables.memory import (
    StateMemory,
    allocate_like,
    as_real,
    check_disjoint,
    check_parameter,
    find_shared,
    is_dense,
    same_order,
)


def strided(shape, strides):
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
    return torch.zeros(max(reach, 0) + 1).as_strided(shape, strides)


DENSE = {
    "contiguous": ((2, 3, 4), (12, 4, 1)),
    "transposed": ((3, 2), (1, 3)),
    "channels_last": ((2, 3, 4, 5), (60, 1, 15, 3)),
    "0-dim": ((), ()),
    "empty": ((0, 3), (3, 1)),
    "empty, expanded": ((0, 3), (0, 0)),
    "any stride at size 1": ((1, 4), (77, 1)),
    "one element": ((1, 1), (0, 0)),
}
WITH_GAPS = {
    "every second": ((5,), (2,)),
    "columns": ((4, 2), (3, 1)),
    "columns, transposed": ((2, 4), (1, 3)),
    "gap in the middle": ((2, 3, 2), (10, 2, 1)),
}
OVERLAPPING = {
    "expanded": ((3, 4), (0, 1)),
    "expanded scalar": ((5,), (0,)),
    "sliding window": ((3, 3), (1, 1)),
    "reaching in": ((2, 3), (2, 1)),
}


@pytest.mark.parametrize(("shape", "strides"), DENSE.values(), ids=DENSE)
def test_dense(shape, strides):
    assert is_dense(strided(shape, strides))


@pytest.mark.parametrize(("shape", "strides"), WITH_GAPS.values(), ids=WITH_GAPS)
def test_with_gaps(shape, strides):
    assert not is_dense(strided(shape, strides))


@pytest.mark.parametrize(("shape", "strides"), OVERLAPPING.values(), ids=OVERLAPPING)
def test_overlapping(shape, strides):
    with pytest.raises(ValueError, match="overlap"):
        is_dense(strided(shape, strides))
    with pytest.raises(ValueError, match=r"parameter 3 \(shape .*overlap"):
        check_parameter(strided(shape, strides), 3)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 4), max_size=4), st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_dense_is_what_it_says(shape, strides):
    """By the definition: the offsets are all different, and without holes."""
    tensor = strided(shape, strides[: len(shape)])
    offsets = torch.arange(tensor.untyped_storage().nbytes() // 4).as_strided(tensor.shape, tensor.stride()).flatten()
    distinct = len(set(offsets.tolist())) == tensor.numel()
    filled = int(offsets.max()) + 1 == tensor.numel()
    try:
        assert is_dense(tensor) == (distinct and filled)
        assert distinct
    except ValueError:
        assert not (distinct and filled)


def test_same_order_ignores_strides_that_are_never_used():
    assert same_order(strided((1, 4), (9, 1)), strided((1, 4), (4, 1)))
    assert same_order(strided((0, 4), (9, 1)), strided((0, 4), (4, 1)))
    assert same_order(strided((), ()), strided((), ()))
    assert same_order(strided((1,), (5,)), strided((1,), (1,)))
    assert not same_order(strided((4, 4), (1, 4)), strided((4, 4), (4, 1)))
    assert not same_order(strided((3,), (0,)), strided((3,), (1,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("zero", [False, True], ids=["empty", "zeros"])
@pytest.mark.parametrize("other", [None, torch.float32], ids=["same", "float32"])
def test_views_of_one_allocation(dtype, zero, other):
    shapes = [(3,), (), (0,), (16, 5), (1,), (2, 3, 4, 5), (64,), (7,)]
    like = [torch.empty(shape, dtype=dtype) for shape in shapes]
    like[3] = torch.empty(5, 16, dtype=dtype).t()
    like[5] = like[5].to(memory_format=torch.channels_last)
    views = allocate_like(like, zero=zero, dtype=other)
    dtype = other or dtype
    assert [v.shape for v in views] == [t.shape for t in like]
    assert [v.stride() for v in views] == [t.stride() for t in like]
    assert {v.dtype for v in views} == {dtype}
    assert len({v.untyped_storage().data_ptr() for v in views}) == 1
    assert all(v.data_ptr() % 64 == views[0].data_ptr() % 64 for v in views if v.numel())
    if zero:
        assert all(not v.any() for v in views)
    for i, view in enumerate(views):
        view.fill_(i + 1)
    assert all(bool((view == i + 1).all()) for i, view in enumerate(views)), "two views overlap"
    reach = max(v.storage_offset() + v.numel() for v in views)
    assert reach * dtype.itemsize <= views[0].untyped_storage().nbytes()


def test_as_real():
    assert as_real(real := torch.ones(3)) is real
    numbers = values((3, 2), torch.complex128)
    pairs = as_real(numbers)
    assert (pairs.shape, pairs.dtype, pairs.data_ptr()) == ((3, 2, 2), torch.float64, numbers.data_ptr())
    assert_same_bits(as_real(numbers.conj()), torch.view_as_real(numbers.conj().resolve_conj()))
    assert_same_bits(as_real(numbers.conj().imag), -numbers.imag)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "dtype torch.int64 is not supported"),
        (torch.zeros(3, device="meta"), "meta"),
        (torch.zeros(3).to_sparse(), "sparse"),
        (torch.zeros(3).expand(2, 3), "overlap"),
        (torch.zeros(0, 3), None),
        (torch.zeros(4, 4).t(), None),
        (torch.zeros(8)[::2], None),
        (torch.full((), math.nan), None),
    ],
    ids=["integers", "meta", "sparse", "expanded", "empty", "transposed", "with gaps", "0-dim"],
)
def test_which_parameters_can_be_trained(param, message):
    if message is None:
        check_parameter(param, 2)
        return
    with pytest.raises(ValueError, match=rf"parameter 2 \(shape .*\): .*{message}"):
        check_parameter(param, 2)


# ---- memory in common ----

BUFFER = torch.zeros(64)
views = st.builds(
    lambda shape, strides, start, dtype: BUFFER.view(dtype).as_strided(shape, strides[: len(shape)], start),
    st.sampled_from([(), (0,), (1,), (3,), (2, 2), (2, 1, 2)]),
    st.sampled_from([(1, 2, 4), (7, 2, 1), (3, 6, 1), (4, 1, 2)]),
    st.integers(0, 12),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]),
)


def bytes_of(tensor):
    size = tensor.element_size()
    places = [tensor[at].data_ptr() for at in itertools.product(*map(range, tensor.shape))]
    return {place + i for place in places for i in range(size)}


@settings(deadline=None, max_examples=300)
@given(st.lists(views, max_size=4))
def test_who_shares_memory(tensors):
    """Against sets of bytes."""
    everything = [bytes_of(t) for t in tensors]
    sharing = {(i, j) for i in range(len(tensors)) for j in range(i) if everything[i] & everything[j]}
    found = find_shared(tensors)
    assert (found is None) == (not sharing)
    if found is not None:
        assert tuple(sorted(found, reverse=True)) in sharing


def test_two_dense_tensors_are_never_compared_by_element(monkeypatch):
    """They may be huge, and where one begins inside the other they share."""

    def compared(tensors):
        assert len(tensors) < 2

    monkeypatch.setattr(layouts, "_find_shared_element", compared)
    memory = torch.zeros(100)
    assert find_shared([memory[:50], memory[50:]]) is None
    assert find_shared([memory[60:], memory[:50], memory[10:20].view(2, 5).t()]) == (1, 2)


def test_the_message_names_both():
    matrix = torch.zeros(4, 4, requires_grad=True)
    check_disjoint([matrix[:, 0], matrix[:, 1], matrix[:, 2:]])
    with pytest.raises(
        ValueError, match=r"parameter 2 \(shape \(4, 2\)\) shares memory with parameter 0 \(shape \(4,\)\)"
    ):
        check_disjoint([matrix[:, 1], matrix[:, 3], matrix[:, :2]])


class TestStateMemory:
    """State: each tensor has memory of its own, all have one version."""

    SHAPES = ((), (0,), (3,), (2, 5), (200, 3))

    def made(self, memory, dtype=torch.float32):
        likes = [torch.zeros(shape) for shape in self.SHAPES] + [torch.zeros(4, 3).t()]
        return likes, [memory.allocate(like, dtype) for like in likes]

    @pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
    def test_layout(self, dtype):
        likes, made = self.made(StateMemory(), dtype)
        for like, tensor in zip(likes, made, strict=True):
            assert tensor.dtype == dtype
            assert (tensor.shape, tensor.stride()) == (like.shape, like.stride())
            assert tensor.untyped_storage().nbytes() == like.numel() * dtype.itemsize, "a pickle contains the storage"
            assert tensor.storage_offset() == 0
            assert tensor._base is None
        assert find_shared(made) is None

    def test_more_than_a_run(self):
        memory = StateMemory()
        made = [memory.allocate(torch.zeros(2), torch.float32).fill_(i) for i in range(2 * StateMemory.RUN + 1)]
        assert [tensor.tolist() for tensor in made] == [[i, i] for i in range(len(made))]

    def test_one_version(self):
        memory = StateMemory()
        _, singles = self.made(memory)
        _, doubles = self.made(memory, torch.float64)
        other = torch.zeros(3)
        everything = [*singles, other, *doubles]
        distinct = memory.distinct(everything)
        assert len(distinct) == 3
        assert any(tensor is other for tensor in distinct)
        before = [tensor._version for tensor in everything]
        torch.autograd.graph.increment_version(distinct)
        assert [tensor._version for tensor in everything] == [version + 1 for version in before]

    def test_none_of_its_own(self):
        memory = StateMemory()
        self.made(memory)
        other = torch.zeros(3)
        distinct = memory.distinct([other])
        assert len(distinct) == 1
        assert distinct[0] is other
