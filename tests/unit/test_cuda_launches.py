"""The plain functions of CUDA kernels: launches, arguments, chunks, vectors, powers, random rounding. On the CPU."""

import ctypes
from fractions import Fraction

import cuda_on_cpu
import pytest
import torch
from golden import EDGES, GOLDEN, LOW, rounded
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def library():
    return cuda_on_cpu.load()


def integers(numbers):
    return (ctypes.c_int64 * len(numbers))(*numbers)


def plan(library, sizes, chunk_size, capacity):
    rows = integers([0] * (6 * (len(sizes) + 1)))
    arguments = map(ctypes.c_int64, (len(sizes), chunk_size, capacity))
    count = library.plan(integers(sizes), *arguments, rows)
    return [tuple(rows[6 * i : 6 * i + 6]) for i in range(count)]


def assert_planned(library, sizes, chunk_size, capacity):
    """Every tensor and every chunk is in one launch, in order, and there are as few as can be."""
    launches = plan(library, sizes, chunk_size, capacity)
    assert len(launches) == -(-len(sizes) // capacity)
    tensor = chunk = 0
    for i, (first_tensor, tensors, first_chunk, chunks, first, last) in enumerate(launches):
        assert (first_tensor, first_chunk) == (tensor, chunk)
        assert 0 < tensors <= capacity
        assert chunks == sum(-(-size // chunk_size) for size in sizes[tensor : tensor + tensors])
        assert (first, last) == (i == 0, i == len(launches) - 1)
        tensor, chunk = tensor + tensors, chunk + chunks
    assert tensor == len(sizes)


@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 15, 16, 17, 2**31 - 1, 2**31, 2**33 + 5]), min_size=1, max_size=40),
    chunk_size=st.sampled_from([1, 16, 4096, 65536]),
    capacity=st.integers(1, 41),
)
def test_launches_partition_any_table(library, sizes, chunk_size, capacity):
    assert_planned(library, sizes, chunk_size, capacity)


@pytest.mark.parametrize("capacity", ["few_tensors", "many_tensors"])
@pytest.mark.parametrize("extra", [-1, 0, 1], ids=["one-less", "full", "one-more"])
@pytest.mark.parametrize("launches", [1, 2])
def test_tables_around_what_the_arguments_hold(library, capacity, extra, launches):
    capacity = getattr(library, capacity)()
    count = launches * capacity + extra
    sizes = [7] * count
    for boundary in range(0, count + 1, capacity):
        for i in (boundary - 1, boundary):
            if 0 <= i < count:
                sizes[i] = 0
    assert_planned(library, sizes, 4, capacity)
    assert_planned(library, [0] * count, 4, capacity)


@pytest.mark.parametrize(("first", "count"), [(0, 4064), (4063, 1), (4064, 4064), (4064, 1), (8127, 2)])
def test_arguments_hold_the_launchs_gradients(library, first, count):
    addresses = [1000 * i for i in range(8129)]
    found = integers([0] * count)
    library.packed_grads(integers(addresses), *map(ctypes.c_int64, (len(addresses), first, count)), found)
    assert list(found) == addresses[first : first + count]


def test_chunks_far_into_a_tensor_are_found(library):
    start, address = (2**33 + 4096) // 4096 * 4096, 1 << 46
    chunks = [0, 0, 4096, 0, 1, start, 5, 2, 3, 0, 1, 1]

    def find(index):
        found = integers([0] * 5)
        library.find_chunk(integers(chunks), *map(ctypes.c_int64, (1, 1, 2, index, address)), found)
        return list(found)

    assert find(0) == [1, start, 5, 2, address + 8 * start]
    assert find(1) == [3, 0, 1, 1, address]
    assert find(2) == [1, 0, 0, 0, address], "no chunk: nothing of the launch's first tensor"


@given(
    element_size=st.sampled_from([2, 4, 8]),
    offsets=st.lists(st.integers(0, 20), min_size=1, max_size=9),
    length=st.integers(0, 70) | st.integers(2**30 - 20, 2**30),
)
def test_vectors_are_aligned_and_as_many_as_can_be(library, element_size, offsets, length):
    addresses = [(1 << 40) + element_size * offset for offset in offsets]
    differences = 0
    for address in addresses:
        differences |= address ^ addresses[0]
    found = integers([0, 0])
    library.split(*map(ctypes.c_int64, (addresses[0], differences, length, element_size)), found)
    head, vectors = found
    width = 16 // element_size
    alike = len({address % 16 for address in addresses}) == 1
    wanted_head = min(-addresses[0] % 16 // element_size, length) if alike else 0
    assert head == wanted_head
    assert vectors == ((length - head) // width if alike else 0)
    if vectors:
        assert all((address + head * element_size) % 16 == 0 for address in addresses)


@settings(deadline=None)  # exact powers of fractions take their time
@given(
    base=st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.9, 0.999, 0.9999999, 1 - 2.0**-53]),
    exponent=st.integers(1, 40) | st.sampled_from([1000, 4095, 2**14 + 1]),
)
def test_powers_are_correctly_rounded(library, base, exponent):
    expected = float(Fraction(base) ** exponent)
    found = library.power(ctypes.c_double(base), ctypes.c_int64(exponent))
    assert found == expected or expected < 1e-200, "what underflows is lost beside 1"


@pytest.mark.parametrize(("key", "number"), GOLDEN.items(), ids=str)
def test_golden_numbers(library, key, number):
    *words, element = key
    found = library.random_number(*map(ctypes.c_uint32, words), ctypes.c_int64(element))
    assert found % 2**32 == number


@LOW
def test_rounding_by_a_random_number(library, dtype):
    """Also where no sum of 16-bit numbers gets to: all that float32 has."""
    function = getattr(library, f"{str(dtype).removeprefix('torch.')}_bits")

    def check(x, r):
        (expected,) = torch.tensor([rounded(x, r, dtype)]).to(dtype).view(torch.int16).tolist()
        assert function(ctypes.c_float(x), ctypes.c_uint32(r)) % 2**16 == expected % 2**16, f"{x!r}, {r:#x}"

    for edge in EDGES[dtype]:
        for sign in (1, -1):
            for r in (0, 1, 0xFF, 0x7FFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFF0000, 0xFFFFFFFF):
                check(*torch.tensor([sign * edge]).tolist(), r)

    numbers = st.floats(width=32, allow_nan=False) | st.floats(-(2.0**-13), 2.0**-13, width=32)
    settings(deadline=None)(given(x=numbers, r=st.integers(0, 2**32 - 1))(check))()
