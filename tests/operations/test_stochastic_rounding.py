"""What every backend stores with stochastic rounding, bit for bit: each result by golden random numbers of its own."""

import math

import pytest
import torch
from checks import assert_same_bits
from golden import LOW, expect, rounded
from scene import descent_coefficients, norm_of

from fastsam.precision import Precision, ascent_seed
from fastsam.spec import (
    PERTURBATION,
    AdamOptions,
    Ascent,
    AscentForm,
    AscentOptions,
    Descent,
    DescentCoefficients,
    DescentForm,
    Draw,
    Row,
    SGDOptions,
    Update,
)
from fastsam.tables import Member, TensorTable


class Scene:
    """A stochastic table over one tensor at ``position``, which has had ``step`` updates."""

    def __init__(self, w, g, device, position=0, step=0, strides=None, *, masters=False):
        self.param = torch.empty_strided(w.shape, strides or w.stride(), dtype=w.dtype, device=device).copy_(w)
        self.param.grad = g.to(device)
        self.table = TensorTable(device, w.dtype, [Member(position, self.param, 0)], Precision(True, masters))
        self.table.read_grads()
        self.table.perturbed = [0]
        self.table.set_row(Row.BACKUP, [torch.empty_like(self.param)])
        if masters:
            self.table.set_row(Row.MASTER, [self.param.float()])
            self.table.set_row(Row.BACKUP, self.table.masters)
        self.table.set_row(Row.STEP, [torch.tensor(float(step), device=device)])

    def ascend(self, operations, seed, rho=1.0, norm=1.0):
        ascent = Ascent([AscentOptions(rho, False, False, seed)], norm_of(norm, self.param.device))
        operations.perturb_(self.table, ascent)

    def ascend_by(self, operations, seed, form, a, b=0.0):
        coefficients = torch.tensor([[a, b, 0.0, 0.0]], dtype=torch.float64).to(self.param.device)
        options = [AscentOptions(0.0, False, False, seed)]
        operations.perturb_(self.table, Ascent(options, form=form, coefficients=coefficients))

    def update(self, operations, options, moments, descent=None, found_inf=None):
        moments = [t.to(self.param.device, copy=True) for t in moments]
        for slot, moment in enumerate(moments):
            self.table.set_row(Row(Row.STATE + slot), [moment])
        kind = Update.ADAM if isinstance(options, AdamOptions) else Update.SGD
        operations.restore_and_update_(self.table, kind, [options], descent, None, found_inf)
        return moments


def weights_and_steps(dtype, n=3001):
    """16-bit numbers whose sums are exact in float32, but not in 16 bits."""
    generator = torch.Generator().manual_seed(1)
    w = (torch.randint(64, 127, (n,), generator=generator) / 64).to(dtype)
    g = (torch.randint(-127, 127, (n,), generator=generator) / 2**17).to(dtype)
    return w, g


KEYS = [(0, 0, 0), (0xFFFFFFFF, 3, 1999), (12345, 70000, 2)]
every_key = pytest.mark.parametrize(("seed", "step", "position"), KEYS, ids=str)


pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("masters", [False, True], ids=["no-masters", "masters"])
@every_key
@LOW
def test_the_ascent_is_rounded_by_the_golden_numbers(operations, device, dtype, seed, step, position, masters):
    w, g = weights_and_steps(dtype)
    scene = Scene(w, g, device, position, step, masters=masters)
    scene.ascend(operations, seed)
    expected = expect(w.float() + g.float(), dtype, seed, step, position, Draw.ASCENT)
    assert (expected != (w.float() + g.float()).to(dtype)).any(), "not just the nearest"
    assert_same_bits(scene.param.cpu(), expected)
    operations.restore_(scene.table)
    assert_same_bits(scene.param.cpu(), w)


@LOW
def test_further_ascents_have_random_numbers_of_their_own(operations, device, dtype):
    """Nine ascents of one step, as inner_steps=9 has them, each to the same point: nine different roundings."""
    w, g = weights_and_steps(dtype)
    scene = Scene(w, g, device, 3, 4)
    seen = set()
    for number in range(9):
        seed = ascent_seed(5, number)
        scene.ascend_by(operations, seed, AscentForm(y=PERTURBATION) if number else AscentForm(), 1.0)
        assert_same_bits(scene.param.cpu(), expect(w.float() + g.float(), dtype, seed, 4, 3, Draw.ASCENT))
        seen.add(bytes(scene.param.cpu().view(torch.uint8).tolist()))
    assert len(seen) == 9
    operations.restore_(scene.table)
    assert_same_bits(scene.param.cpu(), w)


@every_key
@LOW
def test_the_update_is_rounded_by_the_golden_numbers(operations, device, dtype, seed, step, position):
    """Weights and state, each by numbers of its own."""
    w, g = weights_and_steps(dtype)
    buffer = w.flip(0) if step else torch.zeros_like(w)
    scene = Scene(w, g, device, position, step)
    scene.ascend(operations, seed)
    (actual,) = scene.update(operations, SGDOptions(0.5, 0.5, 0.0, 0.0, False, False, seed), [buffer])
    new = 0.5 * buffer.float() + g.float()
    assert_same_bits(actual.cpu(), expect(new, dtype, seed, step, position, Draw.STATE), "momentum_buffer")
    weights = expect(w.float() - 0.5 * new, dtype, seed, step, position, Draw.WEIGHT)
    assert_same_bits(scene.param.cpu(), weights, "weights")
    assert float(scene.table.steps[0]) == step + 1


@LOW
def test_every_result_has_random_numbers_of_its_own(operations, device, dtype):
    """Weights, three moments and the method state, of one step."""
    w, g = weights_and_steps(dtype)
    first, second, largest, kept = (w.roll(i) for i in (1, 2, 3, 4))
    g = g * 64
    scene = Scene(w, g, device, 5, 9)
    scene.ascend(operations, 77)
    state = kept.to(device, copy=True)
    scene.table.set_row(Row.METHOD_STATE, [state])
    scene.table.set_row(Row.FIRST_GRAD, [g.flip(0).to(device)])
    columns = {DescentCoefficients.KEEP_FIRST: 1 / 64, DescentCoefficients.KEEP_STATE: 1.0}
    descent = Descent(DescentForm(keeps=True), descent_coefficients(columns, 1, device))
    options = AdamOptions(0.5, 0.5, 0.5, 1e-8, 0.0, False, True, False, 77)
    actual = scene.update(operations, options, [first, second, largest], descent)
    m = first.float() + 0.5 * (g.float() - first.float())
    v = 0.5 * second.float() + 0.5 * g.float().square()
    for slot, want in enumerate((m, v, torch.maximum(v, largest.float()))):
        expected = expect(want, dtype, 77, 9, 5, Draw.STATE + slot)
        assert_same_bits(actual[slot].cpu(), expected, f"state {slot}")
    expected = expect(kept.float() + g.flip(0).float() / 64, dtype, 77, 9, 5, Draw.METHOD_STATE)
    assert_same_bits(state.cpu(), expected, "method state")


@LOW
def test_elements_count_in_memory_order(operations, device, dtype):
    w, g = weights_and_steps(dtype, 24 * 35)
    in_memory = (w.float() + g.float()).view(4, 7, 5, 6)
    w, g = (t.view(4, 7, 5, 6).permute(0, 3, 1, 2) for t in (w, g))
    scene = Scene(w, g.contiguous(), device, strides=w.stride())
    scene.ascend(operations, 9)
    assert_same_bits(scene.param.cpu().permute(0, 2, 3, 1), expect(in_memory, dtype, 9, 0, 0, Draw.ASCENT))


@LOW
def test_an_overflow_changes_nothing(operations, device, dtype):
    w, g = weights_and_steps(dtype)
    scene = Scene(w, g, device)
    scene.ascend(operations, 3)
    options = SGDOptions(0.5, 0.5, 0.0, 0.0, False, False, 3)
    (after,) = scene.update(operations, options, [w.flip(0)], found_inf=torch.ones((), device=device))
    assert_same_bits(scene.param.cpu(), w)
    assert_same_bits(after.cpu(), w.flip(0))
    assert float(scene.table.steps[0]) == 0


@pytest.mark.parametrize(("norm", "rho"), [(math.inf, 1.0), (math.nan, 1.0), (1.0, 0.0)], ids=str)
@LOW
def test_no_ascent_is_no_rounding(operations, device, dtype, norm, rho):
    w, g = weights_and_steps(dtype)
    scene = Scene(w, g, device)
    scene.ascend(operations, 0, rho, norm)
    assert_same_bits(scene.param.cpu(), w)


PERTURBED_TO = {
    torch.bfloat16: [1 + 2**-11, -0.3, 1e30, 3.3 * 2**-130, 2**-133 * 1.25, -(2**-133) * 0.125],
    torch.float16: [1 + 2**-13, -0.3, 60000.5, 1023.4 * 2**-24, 1.25 * 2**-24, -0.125 * 2**-24],
}


@LOW
def test_rounding_is_unbiased(operations, device, dtype):
    """On average the result is the exact one, and only its two neighbours ever appear; subnormal numbers too."""
    n = 1 << 14
    for x in PERTURBED_TO[dtype]:
        (x,) = torch.tensor([x]).tolist()
        start = torch.full((n,), x).to(dtype)
        step = torch.full((n,), 2**12 * (x - float(start[0]))).to(dtype)
        exact = float(start[0].float() + 2**-12 * step[0].float())
        scene = Scene(start, step, device)
        scene.ascend(operations, 11, rho=2**-12)
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
        scene.ascend(operations, 4)
        assert_same_bits(scene.param.cpu(), torch.full((257,), want).to(dtype), f"{w} + {g}")
