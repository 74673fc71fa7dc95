"""What methods beyond SAM ask of every backend: dots, climbs and updates by two tensors, against float64."""

import math

import family
import pytest
import torch
from checks import assert_same_bits, assert_within, values
from test_backends import (
    SHAPES,
    UPDATES,
    Scene,
    every_dtype,
    every_offset,
    expected_update,
    scalar,
    small_chunks,  # noqa: F401
)

from fastsam.backends import AdamOptions, BackendUnavailable
from fastsam.backends.combination import (
    DISTANCE,
    KEEP_KEPT,
    KEEP_TAKEN,
    KEEP_X,
    NOTHING,
    SCALE,
    TERM,
    A,
    B,
    Climb,
    Combination,
    Descent,
    Map,
    default_weights,
)
from fastsam.tables import GRAD, KEPT, PARAM, STATE, TAKEN

few_shapes = pytest.mark.parametrize("shapes", [SHAPES[name] for name in ("scalar", "blocks", "mixed", "chunks")])

CLIMBS = {
    "plain": Climb(),
    "power": Climb(map=Map.POWER),
    "adaptive": Climb(map=Map.ADAPTIVE),
    "average": Climb(y=KEPT),
    "again": Climb(y=DISTANCE),
    "weights": Climb(y=PARAM),
    "momentum": Climb(x=STATE),
    "random": Climb(x=TAKEN),
}
every_climb = pytest.mark.parametrize("form", CLIMBS.values(), ids=CLIMBS)
A_CLIMB = {A: 0.05, B: -0.02, SCALE: 0.7, TERM: 1.5}


@pytest.fixture
def able(operations, device):
    try:
        operations.check_methods(device.type)
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


pytestmark = pytest.mark.usefixtures("able", "small_chunks")


class CombinedScene(Scene):
    """A scene with a second tensor in every row that a form may name; the last parameter lacks it."""

    def __init__(self, shapes, dtype, device, offset=0):
        super().__init__(shapes, dtype, device, offset)
        self.begin_climb()
        self.rows = {row: self.place(seed) for row, seed in ((TAKEN, 600), (KEPT, 700), (STATE, 800))}
        if len(shapes) > 1:
            for tensors in self.rows.values():
                tensors[-1] = None
        self.copies = {row: [None if t is None else t.clone() for t in ts] for row, ts in self.rows.items()}
        self.table.lend(self.rows[TAKEN])
        self.table.kept, self.table.state[0] = self.rows[KEPT], self.rows[STATE]
        self.table._write_row(KEPT, self.rows[KEPT])
        self.table._write_row(STATE, self.rows[STATE])

    def climb(self, *, rng_seed=900):
        """As if there had been a climb: other weights than the backups."""
        for i, (w, backup) in enumerate(zip(self.params, self.backups, strict=True)):
            backup.copy_(w)
            w.add_(0.1 * values(w.shape, self.dtype, self.device, rng_seed + i))
        self.climbed = [w.clone() for w in self.params]

    def combination(self, form, columns, *, climbing):
        """The same weights for all, but for a little."""
        weights = default_weights(len(self.shapes), self.device, climbing=climbing)
        for column, number in columns.items():
            if number != 0:
                weights[:, column] = number + torch.arange(len(self.shapes), device=self.device) / 64
            else:
                weights[:, column] = 0.0
        return Combination(form, weights)

    def operand(self, row, i):
        if row == NOTHING:
            return None
        if row == GRAD:
            return self.grads[i].double()
        if row == PARAM:
            return self.params[i].double()
        if row == DISTANCE:
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            return (self.params[i].to(wide) - self.backups[i].to(wide)).double()
        tensor = self.rows[row][i]
        return None if tensor is None else tensor.double()


def mapped(form, x, w, weights):
    if form.map == Map.POWER:
        return x.sign() * (weights[SCALE] * x).abs() ** weights[TERM]
    if form.map == Map.ADAPTIVE:
        return (weights[SCALE] * w.abs() + weights[TERM]) ** 2 * x
    return x


@every_offset
@every_climb
@every_dtype
@few_shapes
def test_dots_of_a_climb(operations, device, shapes, dtype, form, offset):
    scene = CombinedScene(shapes, dtype, device, offset)
    scene.climb()
    combination = scene.combination(form, A_CLIMB, climbing=True)
    actual = operations.dots(scene.table, combination).tolist()
    for i in range(len(shapes)):
        x, y, w = scene.operand(form.x, i), scene.operand(form.y, i), scene.params[i].double()
        expected = [0.0, 0.0, 0.0]
        if x is not None:
            expected[0] = family.dot([mapped(form, x, w, combination.weights[i])], [x])
        if x is not None and y is not None:
            expected[1:] = family.dot([x], [y]), family.dot([y], [y])
            sizes = family.norm([x]) * family.norm([y])
            assert actual[i][1] == pytest.approx(expected[1], abs=1e-13 * sizes)
        assert actual[i][0] == pytest.approx(expected[0], rel=1e-12)
        assert actual[i][2] == pytest.approx(expected[2], rel=1e-12)
    assert_same_bits(scene.params, scene.climbed)
    scene.assert_surroundings()


@pytest.mark.parametrize("exponent", [0.0, 0.0078125, 0.34375, 1.0, 3.0, 19.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_powers_of_every_magnitude(operations, device, dtype, exponent):
    """From the smallest subnormal number of float32 to the largest; 0 stays 0, whatever the exponent."""
    scene = CombinedScene([(4096,)], dtype, device)
    exponents = torch.empty(4096, dtype=torch.float64).uniform_(-149, 128)
    x = torch.exp2(exponents).copysign(torch.randn(4096, dtype=torch.float64)).to(device, dtype)
    x[::7] = 0.0
    x[1::7] = -0.0
    scene.grads[0].copy_(x)
    scene.params[0].zero_()
    combination = scene.combination(CLIMBS["power"], {A: 1.0, SCALE: 1.0, TERM: 0.0}, climbing=True)
    combination.weights[:, TERM] = exponent
    operations.perturb_by_(scene.table, combination)
    expected = x.double().sign() * x.double().abs() ** exponent
    # As 2^(t * log2(x)) in float64: t * log2(x) is rounded, and the subnormal numbers of float32 twice.
    steps = 4 if dtype == torch.float32 else 4 + 149 * exponent
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(
        scene.params[0], expected.to(dtype), rtol=steps * torch.finfo(dtype).eps, atol=1.01 * smallest
    )
    dots = operations.dots(scene.table, combination).tolist()[0]
    assert dots[0] == pytest.approx(family.dot([expected], [x.double()]), rel=1e-12)


@pytest.mark.parametrize("y", [TAKEN, KEPT, NOTHING], ids=["taken", "kept", "nothing"])
@every_dtype
def test_dots_of_a_descent_are_of_what_has_both(operations, device, dtype, y):
    scene = CombinedScene(SHAPES["mixed"], dtype, device)
    actual = operations.dots(scene.table, scene.combination(Descent(y=y), {}, climbing=True)).tolist()
    for i in range(len(scene.shapes)):
        x, other = scene.operand(GRAD, i), scene.operand(y, i)
        if y == NOTHING:
            assert actual[i] == pytest.approx([family.dot([x], [x]), 0, 0], rel=1e-12)
        elif other is None:
            assert actual[i] == [0, 0, 0]
        else:
            assert actual[i][0] == pytest.approx(family.dot([x], [x]), rel=1e-12)
            assert actual[i][2] == pytest.approx(family.dot([other], [other]), rel=1e-12)


@every_offset
@every_climb
@every_dtype
@few_shapes
def test_perturb_by(operations, device, shapes, dtype, form, offset):
    scene = CombinedScene(shapes, dtype, device, offset)
    if form.y == DISTANCE:
        scene.climb()
    before = [w.clone() for w in scene.params]
    combination = scene.combination(form, A_CLIMB, climbing=True)
    expected, terms = [], []
    for i in range(len(shapes)):
        x, y, w = scene.operand(form.x, i), scene.operand(form.y, i), scene.params[i].double()
        start = scene.backups[i].double() if form.y == DISTANCE else w
        weights = combination.weights[i]
        if x is None:
            expected.append(w)
            terms.append(w.abs())
            continue
        first = weights[A] * mapped(form, x, w, weights)
        second = torch.zeros_like(x) if y is None else weights[B] * y
        expected.append(start + first + second)
        terms.append(start.abs() + first.abs() + second.abs())
    operations.perturb_by_(scene.table, combination)
    assert_same_bits(scene.backups, scene.originals, "backups")
    for i, (one, other, first, term) in enumerate(zip(scene.params, expected, before, terms, strict=True)):
        assert_within(one, other, first, f"weights[{i}]", term)
    for row, copies in scene.copies.items():
        assert_same_bits(scene.rows[row], copies)
    scene.assert_surroundings()


@every_climb
@every_dtype
def test_weights_of_0_leave_everything_alone(operations, device, dtype, form):
    scene = CombinedScene([(2000,), (33,)], dtype, device)
    if form.y == DISTANCE:
        scene.climb()
    before = [w.clone() for w in scene.params]
    for tensor in [*scene.grads, *(t for tensors in scene.rows.values() for t in tensors if t is not None)]:
        tensor[::3] = math.nan
    weights = default_weights(2, device, climbing=True)
    if form.y == DISTANCE:
        weights[:, B] = 1.0
    operations.perturb_by_(scene.table, Combination(form, weights))
    assert_same_bits(scene.params, before)


DESCENTS = {
    "taken": (Descent(y=TAKEN), {A: 1.3, B: -0.4}),
    "kept": (Descent(y=KEPT), {A: 1.0, B: 0.7}),
    "keeps": (Descent(keeps=True), {KEEP_TAKEN: 0.1, KEEP_KEPT: 0.9}),
    "replaces": (Descent(y=TAKEN, keeps=True), {A: 1.0, B: 0.0, KEEP_X: 1.0, KEEP_TAKEN: -0.6, KEEP_KEPT: 0.0}),
    "decoupled": (Descent(y=TAKEN, decoupled=True), {A: 0.0, B: 1.0, 5: 0.09, 6: -0.09}),
}


@every_offset
@pytest.mark.parametrize("options", [UPDATES[name] for name in ("sgd", "sgd-momentum", "adam", "adamw-amsgrad")])
@pytest.mark.parametrize(("form", "columns"), DESCENTS.values(), ids=DESCENTS)
@every_dtype
def test_updates(operations, device, dtype, form, columns, options, offset):
    scene = CombinedScene(SHAPES["mixed"], dtype, device, offset)
    scene.climb()
    scene.give_state(options, [3] * len(scene.shapes))
    slots, _ = scene.state()
    combination = scene.combination(form, columns, climbing=False)
    scale = 4.0
    expected, kept, sizes = [], [], []
    for i, backup in enumerate(scene.backups):
        x, taken, old = (scene.operand(row, i) for row in (GRAD, TAKEN, KEPT))
        weights, moments = combination.weights[i], [None if s[i] is None else s[i] for s in slots]
        y = {TAKEN: taken, KEPT: old, NOTHING: torch.zeros_like(x)}[form.y]
        if y is None or (form.keeps and taken is None):
            direction, extra, new = x, torch.zeros_like(x), None
        else:
            direction = weights[A] * x + weights[B] * y
            extra = weights[5] * x + weights[6] * y if form.decoupled else torch.zeros_like(x)
            new = weights[KEEP_X] * x + weights[KEEP_TAKEN] * taken + weights[KEEP_KEPT] * old
        w, _ = expected_update(options, backup.double(), direction / scale, moments, 3)
        expected.append(w - extra)
        kept.append(new)
        sizes.append(backup.double().abs() + (w - backup.double()).abs() + 2 * extra.abs() + 0.3 * direction.abs())
    operation = operations.restore_and_adam_ if isinstance(options, AdamOptions) else operations.restore_and_sgd_
    operation(scene.table, [options], scalar(scale, device), None, combination)
    for i, (one, other, start) in enumerate(zip(scene.params, expected, scene.originals, strict=True)):
        assert_within(one, other, start, f"weights[{i}]", sizes[i])
    for i, new in enumerate(kept):
        if form.keeps and new is not None:
            size = sum(
                t.abs() for t in (scene.operand(GRAD, i), scene.operand(TAKEN, i), scene.copies[KEPT][i].double())
            )
            assert_within(scene.rows[KEPT][i], new, scene.copies[KEPT][i], f"kept[{i}]", size)
        else:
            assert_same_bits(scene.rows[KEPT][i], scene.copies[KEPT][i])
    assert_same_bits(scene.rows[TAKEN], scene.copies[TAKEN])
    scene.assert_surroundings()


@pytest.mark.parametrize("options", [UPDATES["sgd-momentum"], UPDATES["adam"]], ids=["sgd", "adam"])
@every_dtype
def test_an_overflow_leaves_what_is_kept(operations, device, dtype, options):
    form, columns = DESCENTS["replaces"]
    scene = CombinedScene(SHAPES["mixed"], dtype, device)
    scene.climb()
    scene.give_state(options, [1] * len(scene.shapes))
    before = scene.state()
    operation = operations.restore_and_adam_ if isinstance(options, AdamOptions) else operations.restore_and_sgd_
    combination = scene.combination(form, columns, climbing=False)
    operation(scene.table, [options], None, scalar(1.0, device), combination)
    assert_same_bits(scene.params, scene.originals)
    assert_same_bits(scene.rows[KEPT], scene.copies[KEPT])
    assert_same_bits(list(scene.state()), list(before))
