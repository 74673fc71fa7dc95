"""Stochastic rounding: its random numbers, and what every backend makes of them, against integers in plain Python."""

import math
import struct

import pytest
import torch
from checks import assert_same_bits, bits
from test_backends import norm_of

from fastsam.backends import AdamOptions, ClimbOptions, SGDOptions, reference
from fastsam.backends.rounding import make_keys, random_words, round_stochastically
from fastsam.tables.state import StateNames
from fastsam.precision import Precision
from fastsam.tables import Member, TensorTable

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])

CLIMB, UPDATE = 0, 1  # operations; a state slot has the one after UPDATE by its index

# (seed, step, position, operation, element): the random number.
GOLDEN = {
    (0, 0, 0, 0, 0): 0x465C91D4,
    (0, 0, 0, 0, 1): 0xC5296C64,
    (0, 0, 0, 1, 0): 0x9F171057,
    (0, 0, 1, 0, 0): 0x60D73C01,
    (0, 1, 0, 0, 0): 0x0B97EFFF,
    (1, 0, 0, 0, 0): 0xA49C0D40,
    (0xFFFFFFFF, 16777216, 1999, 4, 0xFFFFFFFF): 0x6BEDB821,
    (0xDEADBEEF, 123456, 77, 3, 0x1_0000_0000): 0x1FF0F81E,
    (42, 7, 3, 2, 0x3_0000_0005): 0x87D899BA,
}


def mix(x):
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def random_number(seed, step, position, operation, element):
    """The contract, in plain Python."""
    word = (8 * position + operation) % 2**32
    k0 = mix(mix(mix(seed ^ 0x9E3779B9) ^ step) ^ word)
    k1 = mix(mix(mix(seed ^ 0xC2B2AE35) ^ word) ^ step)
    return mix(mix(element % 2**32 ^ k0) ^ (k1 + (element >> 32) * 0x9E3779B1) % 2**32)


def rounded(x, r, dtype):
    """The neighbour of ``x`` in ``dtype`` that the random number ``r`` chooses."""
    word = struct.unpack("<I", struct.pack("<f", x))[0]
    if dtype == torch.bfloat16:
        if word % 2**31 >= 0x7F7F0000:
            return float(torch.tensor(x).to(dtype))
        return struct.unpack("<f", struct.pack("<I", (word + (r >> 16)) & 0xFFFF0000))[0]
    if not abs(x) < 65504:
        return float(torch.tensor(x).to(dtype))
    if abs(x) >= 2**-14:
        return struct.unpack("<f", struct.pack("<I", (word + (r >> 19)) & 0xFFFFE000))[0]
    whole = math.floor(abs(x) * 2**24)
    whole += (r >> 8) / 2**24 < abs(x) * 2**24 - whole
    return math.copysign(whole / 2**24, x)


def expect(xs, dtype, *key):
    """float32 ``xs``, in memory order, as the operation of ``key`` (all but the element) stores them."""
    numbers = [rounded(x, random_number(*key, i), dtype) for i, x in enumerate(xs.flatten().tolist())]
    return torch.tensor(numbers, dtype=torch.float64).to(dtype).view(xs.shape)


# ---- the random numbers ----


@pytest.mark.parametrize(("key", "number"), GOLDEN.items(), ids=str)
def test_golden_numbers(key, number):
    assert random_number(*key) == number
    *words, element = key
    seed, step, position, operation = words
    keys = make_keys(seed, torch.tensor(step), position, operation)
    assert int(random_words(keys, element, 1)) == number


def test_the_bits_are_fair():
    """Every bit is set half of the time, whichever of the key's words counts."""
    n = 1 << 16
    elements = random_words(make_keys(3, torch.tensor(5), 7, 1), 0, n)
    steps = random_words(make_keys(3, torch.arange(n), 7, 1), 0, 1)
    for words in (elements, steps):
        share = torch.stack([(words >> bit & 1).double().mean() for bit in range(32)])
        assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(n)
        assert words.unique().numel() > n - 10
    assert abs(float(torch.corrcoef(torch.stack([elements.double(), steps.double()]))[0, 1])) < 5 / math.sqrt(n)


# ---- one number ----

EDGES = {
    torch.bfloat16: [0.0, 1.0, 1 + 2**-9, 0.3, 3.3e38, 3.38953139e38, 3.39e38, 1e-38, 1e-40, 1e-45, 9.2e-41, math.inf],
    torch.float16: [
        *(0.0, 1.0, 1 + 2**-12, 0.3, 65503.9, 65504.0, 65504.1, 65519.9, 65520.0, 1e6, math.inf),
        *(2**-14, 2**-14 * 1.0001, 2**-14 * 0.9999, 2**-24, 2**-25, 1.7 * 2**-24, 1e-20, 1e-45, 1023.7 * 2**-24),
    ],
}


@LOW
def test_edges(dtype):
    """Zeros, subnormal numbers, the largest, and what lies beyond, with random numbers of all sizes."""
    words = [0, 1, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFF0000, 0xFFFFFFFF]
    for edge in EDGES[dtype]:
        for sign in (1, -1):
            (x,) = torch.tensor([sign * edge]).tolist()
            actual = round_stochastically(torch.full((len(words),), x), torch.tensor(words), dtype)
            assert_same_bits(actual, torch.tensor([rounded(x, r, dtype) for r in words]).to(dtype), f"{x!r}")


@LOW
def test_a_nan_stays_one(dtype):
    assert round_stochastically(torch.full((4,), math.nan), torch.tensor([0, 1, 2**31, 2**32 - 1]), dtype).isnan().all()


@LOW
def test_what_the_dtype_has_is_kept(dtype):
    """All 65,536 of them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for r in (0, 0x80000000, 0xFFFFFFFF):
        assert_same_bits(round_stochastically(every.float(), torch.full(every.shape, r), dtype), every)


# ---- on every backend ----


class Scene:
    """A stochastic table over one tensor at ``position``, between canaries of other parameters."""

    def __init__(self, w, g, device, position=0, step=0, strides=None):
        self.param = torch.empty_strided(w.shape, strides or w.stride(), dtype=w.dtype, device=device).copy_(w)
        self.param.grad = g.to(device)
        self.table = TensorTable(device, w.dtype, [Member(position, self.param, 0)], Precision(stochastic=True))
        self.step = step

    def climb(self, operations, seed, rho=1.0):
        self.table.read_grads()
        entry = {self.param: {"fastsam_step": torch.tensor(float(self.step))}}
        self.table.begin_climb([True], entry, [StateNames()])
        operations.perturb_(self.table, norm_of(1.0, self.param.device), [ClimbOptions(rho, False, False, seed)])

    def update(self, operations, options, names, moments, found_inf=None):
        moments = [t.to(self.param.device, copy=True) for t in moments]
        count = {names.step: torch.tensor(float(self.step))} if names.step else {}
        entry = {self.param: {**dict(zip(names.moments, moments, strict=True)), **count}}
        self.table.publish_state(entry, self.table.prepare_state(entry, [names]))
        operation = operations.restore_and_adam_ if isinstance(options, AdamOptions) else operations.restore_and_sgd_
        operation(self.table, [options], None, found_inf)
        return [entry[self.param][name] for name in names.moments]


def weights_and_steps(dtype, n=3001):
    """16-bit numbers whose sums are exact in float32, but not in 16 bits."""
    generator = torch.Generator().manual_seed(1)
    w = (torch.randint(64, 127, (n,), generator=generator) / 64).to(dtype)
    g = (torch.randint(-127, 127, (n,), generator=generator) / 2**17).to(dtype)
    return w, g


KEYS = [(0, 0, 0), (0xFFFFFFFF, 3, 1999), (12345, 70000, 2)]
every_key = pytest.mark.parametrize(("seed", "step", "position"), KEYS, ids=str)


@every_key
@LOW
def test_the_climb_is_rounded_by_the_golden_numbers(operations, device, dtype, seed, step, position, small_chunks):
    w, g = weights_and_steps(dtype)
    scene = Scene(w, g, device, position, step)
    scene.climb(operations, seed)
    expected = expect(w.float() + g.float(), dtype, seed, step, position, CLIMB)
    assert (expected != (w.float() + g.float()).to(dtype)).any(), "not just the nearest"
    assert_same_bits(scene.param.cpu(), expected)
    operations.restore_(scene.table)
    assert_same_bits(scene.param.cpu(), w)


@every_key
@LOW
def test_the_update_is_rounded_by_the_golden_numbers(operations, device, dtype, seed, step, position, small_chunks):
    """Weights and state, each by numbers of its own."""
    w, g = weights_and_steps(dtype)
    buffer = w.flip(0) if step else torch.zeros_like(w)
    scene = Scene(w, g, device, position, step)
    scene.climb(operations, seed)
    options = SGDOptions(0.5, 0.5, 0.0, 0.0, False, False, seed)
    (actual,) = scene.update(operations, options, StateNames(("momentum_buffer",), "fastsam_step"), [buffer])
    new = 0.5 * buffer.float() + g.float()
    assert_same_bits(actual.cpu(), expect(new, dtype, seed, step, position, UPDATE + 1), "momentum_buffer")
    assert_same_bits(scene.param.cpu(), expect(w.float() - 0.5 * new, dtype, seed, step, position, UPDATE), "weights")
    assert scene.table.steps.tolist() == [step + 1]


@LOW
def test_every_moment_has_random_numbers_of_its_own(operations, device, dtype, small_chunks):
    w, g = weights_and_steps(dtype)
    first, second, largest = (w.roll(i) for i in (1, 2, 3))
    g = g * 64
    scene = Scene(w, g, device, 5, 9)
    scene.climb(operations, 77)
    names = StateNames(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), "step")
    options = AdamOptions(0.5, 0.5, 0.5, 1e-8, 0.0, False, True, False, 77)
    actual = scene.update(operations, options, names, [first, second, largest])
    m = first.float() + 0.5 * (g.float() - first.float())
    v = 0.5 * second.float() + 0.5 * g.float().square()
    for slot, want in enumerate((m, v, torch.maximum(v, largest.float()))):
        expected = expect(want, dtype, 77, 9, 5, UPDATE + 1 + slot)
        assert_same_bits(actual[slot].cpu(), expected, names.moments[slot])


@LOW
def test_elements_count_in_memory_order(operations, device, dtype):
    w, g = weights_and_steps(dtype, 24 * 35)
    in_memory = (w.float() + g.float()).view(4, 7, 5, 6)
    w, g = (t.view(4, 7, 5, 6).permute(0, 3, 1, 2) for t in (w, g))
    scene = Scene(w, g.contiguous(), device, strides=w.stride())
    scene.climb(operations, 9)
    assert_same_bits(scene.param.cpu().permute(0, 2, 3, 1), expect(in_memory, dtype, 9, 0, 0, CLIMB))


@LOW
def test_an_overflow_changes_nothing(operations, device, dtype):
    w, g = weights_and_steps(dtype)
    buffer = w.flip(0)
    scene = Scene(w, g, device)
    scene.climb(operations, 3)
    options = SGDOptions(0.5, 0.5, 0.0, 0.0, False, False, 3)
    names = StateNames(("momentum_buffer",), "fastsam_step")
    (after,) = scene.update(operations, options, names, [buffer], torch.ones((), device=device))
    assert_same_bits(scene.param.cpu(), w)
    assert_same_bits(after.cpu(), w.flip(0))
    assert scene.table.steps.tolist() == [0]


@pytest.mark.parametrize(("norm", "rho"), [(math.inf, 1.0), (math.nan, 1.0), (1.0, 0.0)], ids=str)
@LOW
def test_no_climb_is_no_rounding(operations, device, dtype, norm, rho):
    w, g = weights_and_steps(dtype)
    scene = Scene(w, g, device)
    scene.table.read_grads()
    scene.table.begin_climb([True], {}, [StateNames()])
    operations.perturb_(scene.table, norm_of(norm, device), [ClimbOptions(rho, False, False, 0)])
    assert_same_bits(scene.param.cpu(), w)


CLIMBED_TO = {
    torch.bfloat16: [1 + 2**-11, -0.3, 1e30, 3.3 * 2**-130, 2**-133 * 1.25, -(2**-133) * 0.125],
    torch.float16: [1 + 2**-13, -0.3, 60000.5, 1023.4 * 2**-24, 1.25 * 2**-24, -0.125 * 2**-24],
}


@LOW
def test_rounding_is_unbiased(operations, device, dtype):
    """On average the result is the exact one, and only its two neighbours ever appear; subnormal numbers too."""
    n = 1 << 14
    for x in CLIMBED_TO[dtype]:
        (x,) = torch.tensor([x]).tolist()
        start = torch.full((n,), x).to(dtype)
        step = torch.full((n,), 2**12 * (x - float(start[0]))).to(dtype)
        exact = float(start[0].float() + 2**-12 * step[0].float())
        scene = Scene(start, step, device)
        scene.climb(operations, 11, rho=2**-12)
        neighbours = sorted({rounded(exact, 0, dtype), rounded(exact, 2**32 - 1, dtype)})
        got = scene.param.double().cpu()
        assert set(got.unique().tolist()) == set(neighbours), f"{exact!r}"
        gap = neighbours[-1] - neighbours[0]
        share = (exact - neighbours[0]) / gap
        error = (float(got.mean()) - exact) / gap
        assert abs(error) < 5 * math.sqrt(share * (1 - share) / n), f"{exact!r}: {error}"


@LOW
def test_representable_results_and_extremes(operations, device, dtype):
    """What is exact is stored; nothing becomes infinite that is not so to nearest."""
    largest = torch.finfo(dtype).max
    spacing = largest * torch.finfo(dtype).eps / 2 / (1 - torch.finfo(dtype).eps / 2)
    starts = [1.0, -1.0, largest, -largest, largest, 0.0, -0.0]
    steps = [2.0, 0.5, spacing / 4, -spacing / 4, spacing, 0.0, -0.0]
    expected = [3.0, -0.5, largest, -largest, math.inf, 0.0, -0.0]
    for w, g, want in zip(starts, steps, expected, strict=True):
        scene = Scene(torch.full((257,), w).to(dtype), torch.full((257,), g).to(dtype), device)
        scene.climb(operations, 4)
        assert_same_bits(scene.param.cpu(), torch.full((257,), want).to(dtype), f"{w} + {g}")


@pytest.fixture
def small_chunks(operations, monkeypatch):
    if hasattr(operations, "CHUNK_SIZE"):
        monkeypatch.setattr(operations, "CHUNK_SIZE", 1024)


def test_pieces_do_not_show(device, monkeypatch):
    """Plain PyTorch makes the random numbers piece by piece."""
    w, g = weights_and_steps(torch.bfloat16)
    results = []
    for piece in (2**22, 64):
        monkeypatch.setattr("fastsam.backends.rounding.PIECE", piece)
        scene = Scene(w, g, device)
        scene.climb(reference, 1)
        results.append(bits(scene.param))
    assert torch.equal(*results)
