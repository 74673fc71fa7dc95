"""The ascent of every backend, and the way back, against the float64 oracle: no optimizer here."""

import math

import oracle
import pytest
import torch
from checks import assert_same_bits
from expected import assert_perturbed, dot, expected_ascent
from pairwise import pairwise
from scene import (
    ASCENT,
    ASCENT_COLUMNS,
    ASCENTS,
    CHUNK,
    EVERY_DTYPE,
    FORMS,
    OFFSETS,
    SHAPES,
    STORED,
    UPDATES,
    Scene,
    combination,
    every_stored,
    norm_of,
    perturb_everything,
    scalar,
    special,
    update_,
)

from fastsam.spec import (
    PERTURBATION,
    Ascent,
    AscentForm,
    AscentOptions,
    Row,
    Update,
)

pytestmark = pytest.mark.usefixtures("small_chunks")


# ---- the ascent ----


@pairwise(shapes=SHAPES, stored=STORED, ascent=ASCENTS, offset=OFFSETS)
def test_perturb_by_a_norm(operations, device, shapes, stored, ascent, offset):
    scene = Scene(shapes, stored, device, offset)
    scene.begin_ascent()
    norm = oracle.norm(scene.originals, scene.grads, [ascent.adaptive] * len(shapes))
    # Each weight moves by about a twentieth of itself.
    assert_ascent(operations, scene, Ascent([ascent._replace(rho=0.05 * norm)], norm_of(norm, device)))


@pairwise(shapes=SHAPES, stored=STORED, form=FORMS, offset=OFFSETS)
def test_perturb_by_a_form(operations, device, shapes, stored, form, offset):
    scene = Scene(shapes, stored, device, offset)
    scene.begin_ascent()
    scene.give_state(UPDATES["sgd-momentum"], [1] * len(shapes))
    scene.give_rows()
    if form.y == PERTURBATION:
        scene.perturb()
    assert_ascent(operations, scene, combination(ASCENT_COLUMNS, form, scene))


def assert_ascent(operations, scene, ascent):
    before = scene.copy_rows()
    expected = {i: expected_ascent(scene, i, ascent) for i in range(len(scene.params))}
    operations.perturb_(scene.table, ascent)
    assert_same_bits(scene.backups, scene.starts, "backups")
    assert_perturbed(scene, expected)
    scene.assert_rows_unchanged(before, Row.PARAM, Row.BACKUP, Row.MASTER)
    scene.assert_surroundings()


@every_stored
def test_groups_ascend_each_their_way(operations, device, stored):
    rho = torch.tensor(2.0, dtype=torch.float64)
    options = [AscentOptions(1.5, False, False), AscentOptions(rho, True, True), AscentOptions(0.0, False, False)]
    scene = Scene([(40,), (41,), (0,), (42,), (43,)], stored, device, groups=[0, 1, 1, 2, 3])
    scene.begin_ascent(perturb=[True, True, True, False])
    ascent = Ascent([*options, AscentOptions(9.0, False, False)], norm_of(10.0, device))
    expected = {i: expected_ascent(scene, i, ascent) for i in (0, 1)}
    operations.perturb_(scene.table, ascent)
    assert_perturbed(scene, expected)
    assert_same_bits(scene.params[2:], scene.originals[2:], "what has rho = 0, or is not perturbed")
    assert_same_bits(scene.backups[:4], scene.starts[:4], "backups")
    scene.assert_surroundings()


@every_stored
def test_a_zero_gradient_moves_nothing(operations, device, stored):
    scene = Scene([(100,)], stored, device, size=0.0)
    scene.begin_ascent()
    norm = operations.grad_norm([scene.table], [ASCENTS["sam"]])
    operations.perturb_(scene.table, Ascent([ASCENTS["sam"]], norm))
    assert float(norm) == 0.0
    assert_same_bits(scene.params, scene.originals)


@pairwise(stored=STORED, ascent=ASCENTS, norm={"nan": math.nan, "inf": math.inf})
def test_a_bad_norm_leaves_the_weights_alone(operations, device, stored, ascent, norm):
    scene = Scene([(2000,), ()], stored, device)
    if scene.table.has_masters:
        scene.params[0][:3] = torch.tensor([-0.0, torch.inf, 5.0])
    else:
        special(scene.params[0])
    scene.note_start()
    scene.grads[0][::3] = math.nan
    scene.grads[0][1::3] = math.inf
    scene.grad_copies = [g.clone() for g in scene.grads]
    scene.begin_ascent()
    operations.perturb_(scene.table, Ascent([ascent], norm_of(norm, device)))
    assert_same_bits(scene.params, scene.originals, "weights")
    assert_same_bits(scene.backups, scene.starts, "backups")
    scene.assert_surroundings()


@pairwise(stored=STORED, form=FORMS)
def test_coefficients_of_0_leave_everything_alone(operations, device, stored, form):
    scene = Scene([(2000,), (33,)], stored, device)
    scene.begin_ascent()
    scene.give_state(UPDATES["sgd-momentum"], [1, 1])
    scene.give_rows(lacking=False)
    if form.y == PERTURBATION:
        scene.perturb()
    for row in (Row.GRAD, Row.STATE, Row.FIRST_GRAD, Row.DIRECTION, Row.METHOD_STATE):
        for tensor in scene.table.rows[row]:
            tensor[::3] = math.nan
    before = scene.copy_rows(Row.PARAM)
    columns = {ASCENT.B: 1.0} if form.y == PERTURBATION else {}
    ascent = combination({}, form, scene)
    for column, number in columns.items():
        ascent.coefficients[:, column] = number
    operations.perturb_(scene.table, ascent)
    scene.assert_rows_unchanged(before)
    assert_same_bits(scene.backups, scene.starts, "backups")


@pytest.mark.parametrize("column", [ASCENT.A, ASCENT.B], ids=["a", "b"])
@every_stored
def test_one_coefficient_of_0_selects(operations, device, stored, column):
    """What it would multiply may be NaN; for both parameters, of which one has a y."""
    scene = Scene([(200,), (33,)], stored, device)
    scene.begin_ascent()
    scene.give_rows()
    form = AscentForm(y=Row.METHOD_STATE)
    ascent = combination(ASCENT_COLUMNS | {column: 0.0}, form, scene)
    expected = {i: expected_ascent(scene, i, ascent) for i in range(2)}
    for tensor in scene.table.rows[Row.GRAD if column == ASCENT.A else Row.METHOD_STATE]:
        if tensor is not None:
            tensor.fill_(math.nan)
    operations.perturb_(scene.table, ascent)
    assert_perturbed(scene, expected)


@every_stored
def test_ascents_after_the_first(operations, device, stored):
    """Each starts from the backup again, which no further one writes."""
    scene = Scene(SHAPES["mixed"], stored, device)
    scene.begin_ascent()
    perturb_everything(operations, scene, rho=0.1)
    for number in range(2):
        scene.give_grads(seed=1000 * (1 + number))
        # Half of the perturbation so far, and none of the gradient in the last.
        columns = {ASCENT.A: 0.05 * (1 - number), ASCENT.B: 0.5}
        ascent = combination(columns, AscentForm(y=PERTURBATION), scene)
        assert_ascent(operations, scene, ascent)
    operations.restore_(scene.table)
    assert_same_bits(scene.params, scene.originals)


@pytest.mark.parametrize("exponent", [0.0, 0.0078125, 0.34375, 1.0, 3.0, 19.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_powers_of_every_magnitude(operations, device, dtype, exponent):
    """From the smallest subnormal number of float32 to the largest; 0 stays 0, whatever the exponent."""
    scene = Scene([(4096,)], dtype, device)
    scene.begin_ascent()
    exponents = torch.empty(4096, dtype=torch.float64).uniform_(-149, 128)
    x = torch.exp2(exponents).copysign(torch.randn(4096, dtype=torch.float64)).to(device, dtype)
    x[::7] = 0.0
    x[1::7] = -0.0
    scene.grads[0].copy_(x)
    scene.params[0].zero_()
    ascent = combination({ASCENT.A: 1.0, ASCENT.SCALE: 1.0}, FORMS["power"], scene)
    ascent.coefficients[:, ASCENT.TERM] = exponent
    operations.perturb_(scene.table, ascent)
    expected = x.double().sign() * x.double().abs() ** exponent
    # As 2^(t * log2(x)) in float64: t * log2(x) is rounded, and the subnormal numbers of float32 twice.
    steps = 4 if dtype == torch.float32 else 4 + 149 * exponent
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(
        scene.params[0], expected.to(dtype), rtol=steps * torch.finfo(dtype).eps, atol=1.01 * smallest
    )
    dots = operations.dots(scene.table, FORMS["power"], ascent.coefficients).tolist()[0]
    assert dots[0] == pytest.approx(dot(expected, x.double()), rel=1e-12)


WAYS = {way: way for way in ("restore", "found-inf", "no-gradient", "for-an-unfused-base")}


@pairwise(way=WAYS, offset=OFFSETS, dtype=EVERY_DTYPE)
def test_restore_returns_every_bit(operations, device, dtype, offset, way):
    scene = Scene([(CHUNK + 9,), (), (0,)], dtype, device, offset)
    special(scene.params[0])
    scene.note_start()
    scene.begin_ascent()
    perturb_everything(operations, scene, rho=3.0)
    addresses = [p.data_ptr() for p in scene.params]
    for param in scene.params:
        param.fill_(math.nan)
    give_back(operations, scene, way)
    assert_same_bits(scene.params, scene.originals, "weights")
    assert [p.data_ptr() for p in scene.params] == addresses
    scene.assert_surroundings()


def give_back(operations, scene, way):
    if way == "restore":
        operations.restore_(scene.table)
    elif way == "found-inf":
        update_(operations, scene, [UPDATES["sgd"]], found_inf=scalar(1.0, scene.device))
    elif way == "for-an-unfused-base":
        operations.restore_and_update_(scene.table, Update.NONE, [])
    else:
        for param in scene.params:
            param.grad = None
        scene.grads = scene.grad_copies = []
        scene.table.read_grads()
        update_(operations, scene, [UPDATES["sgd"]])


@pairwise(way=WAYS, stored=STORED)
def test_restore_with_every_storage(operations, device, stored, way):
    scene = Scene([(CHUNK + 9,), (), (0,)], stored, device)
    scene.begin_ascent()
    scene.give_state(UPDATES["sgd"], [0, 0, 0])
    perturb_everything(operations, scene, rho=3.0)
    for param in scene.params:
        param.fill_(math.nan)
    give_back(operations, scene, way)
    assert_same_bits(scene.params, scene.originals, "weights")
    assert_same_bits(scene.backups, scene.starts, "backups")


@every_stored
def test_restore_touches_only_what_was_perturbed(operations, device, stored):
    scene = Scene([(40,), (41,), (42,)], stored, device, groups=[0, 1, 0])
    scene.give_grads(absent=[2])
    scene.begin_ascent(perturb=[True, False])
    perturb_everything(operations, scene)
    assert not torch.equal(scene.params[0], scene.originals[0])
    assert_same_bits(scene.params[1:], scene.originals[1:])
    for param in scene.params:
        param.fill_(5.0)
    operations.restore_(scene.table)
    assert_same_bits(scene.params[0], scene.originals[0])
    assert all(bool((p == 5.0).all()) for p in scene.params[1:])
