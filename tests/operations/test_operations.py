"""The five operations of every backend against the float64 oracle, from the addresses up: no optimizer here."""

import math

import oracle
import pytest
import torch
from checks import DTYPE_IDS, DTYPES, assert_same_bits, assert_within
from expected import Direction, assert_perturbed, assert_updated, expected_ascent, mapped
from pairwise import pairwise
from scene import (
    ASCENT,
    ASCENT_COLUMNS,
    ASCENTS,
    CHUNK,
    DESCENTS,
    FORMS,
    OFFSETS,
    SHAPES,
    STORED,
    UPDATES,
    Scene,
    combination,
    descent_by,
    every_stored,
    norm_of,
    scalar,
    update_,
)

from fastsam.spec import (
    NONE,
    PERTURBATION,
    AdamOptions,
    Ascent,
    AscentForm,
    AscentOptions,
    DescentForm,
    Row,
    SGDOptions,
    Update,
)

EVERY_DTYPE = dict(zip(DTYPE_IDS, DTYPES, strict=True))
EVERY_DESCENT = {"no-descent": None} | {name: name for name in DESCENTS}
SOME_SHAPES = {name: SHAPES[name] for name in ("scalar", "blocks", "mixed", "chunks")}
ADAPTIVE = {"sam": False, "asam": True}
GRAD_SCALES = {"unscaled": None, "scaled-4": 4.0, "scaled-3": 3.0}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)


@pytest.fixture(autouse=True)
def small_chunks(operations, monkeypatch):
    if hasattr(operations, "CHUNK_SIZE"):
        monkeypatch.setattr(operations, "CHUNK_SIZE", CHUNK)


def perturb_everything(operations, scene, rho=1.0):
    """A first ascent, by a norm of 1."""
    options = [AscentOptions(rho, False, False, 7)] * (max(scene.groups) + 1)
    operations.perturb_(scene.table, Ascent(options, norm_of(1.0, scene.device)))


# ---- the norm ----


@pairwise(shapes=SHAPES, dtype=EVERY_DTYPE, adaptive=ADAPTIVE, offset=OFFSETS)
def test_grad_norm(operations, device, shapes, dtype, adaptive, offset):
    scene = Scene(shapes, dtype, device, offset)
    scene.begin_ascent()
    norm = operations.grad_norm([scene.table], [AscentOptions(0.05, adaptive, False)])
    assert (norm.dtype, norm.shape, norm.device.type) == (torch.float64, (), device.type)
    expected = oracle.norm(scene.originals, scene.grads, [adaptive] * len(shapes))
    assert float(norm) == pytest.approx(expected, rel=1e-12, abs=0)
    assert_same_bits(scene.params, scene.originals, "weights")
    scene.assert_surroundings()


def test_grad_norm_is_one_over_all_tables(operations, device):
    groups = [0, 1, 0]
    shapes = [(3,), (CHUNK + 1,), (0,)]
    scenes = [Scene(shapes, stored, device, groups=groups, seed=i) for i, stored in enumerate(STORED.values())]
    for scene in scenes:
        scene.begin_ascent()
    norm = operations.grad_norm(
        [scene.table for scene in scenes], [AscentOptions(0.05, False, False), AscentOptions(0.0, True, True)]
    )
    expected = [oracle.norm(s.originals, s.grads, [group == 1 for group in groups]) for s in scenes]
    assert float(norm) == pytest.approx(math.hypot(*expected), rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e25),
        (torch.float32, 1e-25),
        (torch.float64, 1e150),
        (torch.float64, 1e-150),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.float16, 1e4),
        (torch.float16, 1e-7),
    ],
    ids=str,
)
def test_squares_neither_overflow_nor_vanish(operations, device, dtype, size):
    scene = Scene([(1000,), (17,)], dtype, device, size=size)
    scene.begin_ascent()
    norm = operations.grad_norm([scene.table], [AscentOptions(0.05, False, False)])
    expected = oracle.norm(scene.originals, scene.grads, [False, False])
    assert expected > 20 * size or dtype == torch.float16  # the input is what the test says
    assert float(norm) == pytest.approx(expected, rel=1e-12, abs=0)


@every_dtype
def test_the_norm_is_of_what_is_perturbed(operations, device, dtype):
    scene = Scene([(5,), (6,), (7,)], dtype, device, groups=[0, 1, 0])
    scene.give_grads(absent=[2])
    scene.begin_ascent(perturb=[True, False])
    norm = operations.grad_norm([scene.table], [AscentOptions(0.05, False, False)] * 2)
    assert float(norm) == pytest.approx(float(scene.grads[0].double().norm()), rel=1e-12)


@pairwise(
    dtype=EVERY_DTYPE,
    adaptive=ADAPTIVE,
    at={"first": 0, "inside": 1023, "last": 1040},
    bad={"nan": math.nan, "inf": math.inf, "-inf": -math.inf},
)
def test_one_bad_gradient_makes_the_norm_bad(operations, device, dtype, adaptive, at, bad):
    scene = Scene([(33,), (1041,), (0,)], dtype, device)
    with torch.no_grad():
        scene.params[1][at] = 0.0  # 0 * inf must not hide it
        scene.grads[1][at] = bad
    scene.begin_ascent()
    assert not operations.grad_norm([scene.table], [AscentOptions(0.05, adaptive, False)]).isfinite()


# ---- the dot products ----


@pairwise(shapes=SOME_SHAPES, stored=STORED, form=FORMS, offset=OFFSETS)
def test_dots_of_an_ascent(operations, device, shapes, stored, form, offset):
    scene = Scene(shapes, stored, device, offset)
    scene.begin_ascent()
    scene.give_state(UPDATES["sgd-momentum"], [1] * len(shapes))
    scene.give_rows()
    scene.perturb()
    before = scene.copy_rows()
    coefficients = combination(ASCENT_COLUMNS, form, scene).coefficients
    result = operations.dots(scene.table, form, coefficients)
    assert (result.dtype, result.shape, result.device.type) == (torch.float64, (len(shapes), 3), device.type)
    for i, actual in enumerate(result.tolist()):
        x, y, w = scene.operand(form.x, i), scene.operand(form.y, i), scene.params[i].double()
        expected = [0.0, 0.0, 0.0]
        if x is not None:
            expected[0] = dot(mapped(form, x, w, coefficients[i]), x)
        if x is not None and y is not None:
            expected[1:] = dot(x, y), dot(y, y)
            assert actual[1] == pytest.approx(expected[1], abs=1e-13 * math.sqrt(dot(x, x) * dot(y, y)))
        assert actual[0] == pytest.approx(expected[0], rel=1e-12)
        assert actual[2] == pytest.approx(expected[2], rel=1e-12)
    scene.assert_rows_unchanged(before)
    scene.assert_surroundings()


def dot(x, y):
    """Summed exactly."""
    return math.fsum((x * y).flatten().tolist())


@pytest.mark.parametrize("y", [Row.FIRST_GRAD, Row.METHOD_STATE, NONE], ids=["first-grad", "method-state", "none"])
@every_stored
def test_dots_of_a_descent_are_of_what_has_both(operations, device, stored, y):
    """Whatever else its form names, and whether it was perturbed or not."""
    scene = Scene(SHAPES["mixed"], stored, device)
    scene.begin_ascent(perturb=[False])
    scene.give_rows()
    coefficients = torch.full((len(scene.shapes), 7), torch.nan, dtype=torch.float64, device=device)
    actual = operations.dots(scene.table, DescentForm(y=y), coefficients).tolist()
    for i in range(len(scene.shapes)):
        x, other = scene.operand(Row.GRAD, i), scene.operand(y, i)
        if y == NONE:
            assert actual[i] == pytest.approx([dot(x, x), 0, 0], rel=1e-12)
        elif other is None:
            assert actual[i] == [0, 0, 0]
        else:
            assert actual[i][0] == pytest.approx(dot(x, x), rel=1e-12)
            assert actual[i][1] == pytest.approx(dot(x, other), abs=1e-13 * math.sqrt(dot(x, x) * dot(other, other)))
            assert actual[i][2] == pytest.approx(dot(other, other), rel=1e-12)


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


# ---- the way back ----


def special(tensor):
    """Fills ``tensor`` with random bits: -0.0, subnormals, infinities, NaNs with payloads."""
    size = tensor.element_size()
    generator = torch.Generator().manual_seed(7)
    raw = torch.randint(0, 256, (tensor.numel() * size,), dtype=torch.uint8, generator=generator)
    numbers = raw.view(tensor.dtype).to(tensor.device).reshape(tensor.shape)
    if tensor.numel() > 4:
        numbers[:4] = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf], dtype=tensor.dtype)
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    tensor.view(as_bits).copy_(numbers.view(as_bits))


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


# ---- the update ----


@pairwise(shapes=SHAPES, stored=STORED, options=UPDATES, offset=OFFSETS)
def test_update(operations, device, shapes, stored, options, offset):
    scene = Scene(shapes, stored, device, offset)
    scene.begin_ascent()
    perturb_everything(operations, scene)
    for param in scene.params:
        param.fill_(math.nan)  # an update that does not start from the backup shows
    scene.give_grads(seed=1000)
    steps = [(0, 1, 300)[i % 3] for i in range(len(shapes))]
    scene.give_state(options, steps)
    before = scene.copy_rows()
    update_(operations, scene, [options])
    assert_updated(scene, [options], before, steps)


@pairwise(stored=STORED, descent=EVERY_DESCENT, options=UPDATES, grad_scale=GRAD_SCALES, offset=OFFSETS)
def test_update_by_a_descent(operations, device, stored, descent, options, grad_scale, offset):
    scene = Scene(SHAPES["mixed"], stored, device, offset)
    scene.begin_ascent()
    perturb_everything(operations, scene, rho=0.1)
    scene.give_state(options, [3] * len(scene.shapes))
    scene.give_rows()
    scene.give_grads(seed=1000, size=grad_scale or 1.0)
    before = scene.copy_rows()
    descent = descent_by(descent, scene)
    scale = None if grad_scale is None else scalar(grad_scale, device)
    update_(operations, scene, [options], scale, None if grad_scale is None else scalar(0.0, device), descent)
    assert_updated(scene, [options], before, [3] * len(scene.shapes), grad_scale or 1.0, descent)
    scene.assert_rows_unchanged({row: before[row] for row in (Row.FIRST_GRAD, Row.DIRECTION)})


@pairwise(stored=STORED, options=UPDATES, descent={name: name for name in ("first-grad", "replaces", "decoupled")})
def test_a_descents_coefficients_of_0_select(operations, device, stored, options, descent):
    """The first pass may have had an Inf."""
    results = []
    for bad in (1.0, math.nan):
        scene = Scene([(300,), (3,)], stored, device)
        scene.begin_ascent(perturb=[False])
        scene.give_state(options, [3, 3])
        scene.give_rows(lacking=False)
        for row in (Row.FIRST_GRAD, Row.METHOD_STATE):
            for tensor in scene.table.rows[row]:
                tensor.fill_(bad)
        by = descent_by(descent, scene)
        by.coefficients.zero_()
        by.coefficients[:, 0] = 1.0
        update_(operations, scene, [options], descent=by)
        results.append(scene.copy_rows(Row.PARAM, Row.MASTER, Row.STATE, Row.STATE_1))
    assert_same_bits(list(results[0].values()), list(results[1].values()))


@pairwise(stored=STORED, options=UPDATES)
def test_groups_update_each_their_way(operations, device, stored, options):
    other = options._replace(lr=0.003, weight_decay=0.02, maximize=not options.maximize)
    scene = Scene([(50,), (0,), (51,), ()], stored, device, groups=[0, 1, 1, 0])
    scene.begin_ascent()
    perturb_everything(operations, scene)
    steps = [4, 5, 0, 6]
    scene.give_state(options, steps)
    before = scene.copy_rows()
    update_(operations, scene, [options, other])
    assert_updated(scene, [options, other], before, steps)


@pairwise(stored=STORED, options=UPDATES, found_inf={"no-scaler": None, "no-overflow": 0.0})
def test_every_mix_of_gradient_and_ascent(operations, device, stored, options, found_inf):
    """Perturbed and updated; perturbed without a second gradient; updated without an ascent; neither."""
    scene = Scene([(2000,), (45,), (46,), (47,), (48,)], stored, device, groups=[0, 0, 1, 1, 0])
    scene.give_grads(absent=[4])
    scene.begin_ascent(perturb=[True, False])
    perturb_everything(operations, scene)
    for i in (0, 1):
        scene.params[i].fill_(math.nan)
    scene.give_grads(seed=7, absent=[1, 3])
    steps = [3, 4, 5, 6, 7]
    scene.give_state(options, steps)
    before = scene.copy_rows()
    overflow = None if found_inf is None else scalar(found_inf, device)
    update_(operations, scene, [options] * 2, found_inf=overflow)
    assert_updated(scene, [options] * 2, before, steps)


@pairwise(stored=STORED, options=UPDATES)
def test_an_overflow_changes_nothing(operations, device, stored, options):
    """Neither on a first step nor on a later one, and the step after it is what it would have been."""
    scene = Scene([(1500,), (), (0,), (33,)], stored, device)
    steps = [0, 0, 3, 3]
    scene.give_state(options, steps)
    for _ in range(2):
        scene.give_grads(size=math.inf)
        scene.begin_ascent()
        operations.perturb_(scene.table, Ascent([ASCENTS["sam"]], norm_of(math.inf, device)))
        before = scene.copy_rows()
        update_(operations, scene, [options], scalar(1024.0, device), scalar(1.0, device))
        assert_same_bits(scene.params, scene.originals, "weights")
        scene.assert_rows_unchanged(before)
        scene.assert_surroundings()
    scene.give_grads(seed=5)
    before = scene.copy_rows()
    update_(operations, scene, [options], None, scalar(0.0, device))
    assert_updated(scene, [options], before, steps)


@pairwise(stored=STORED, descent=EVERY_DESCENT, options={name: UPDATES[name] for name in ("sgd-momentum", "adam")})
def test_an_overflow_leaves_the_method_state(operations, device, stored, options, descent):
    """And what has not been perturbed: its weights, and a master that is not theirs."""
    scene = Scene(SHAPES["mixed"], stored, device, groups=[0, 1] * 4)
    scene.begin_ascent(perturb=[True, False])
    perturb_everything(operations, scene)
    scene.give_state(options, [1] * len(scene.shapes))
    scene.give_rows()
    before = scene.copy_rows()
    update_(operations, scene, [options] * 2, found_inf=scalar(1.0, device), descent=descent_by(descent, scene))
    assert_same_bits(scene.params, scene.originals)
    scene.assert_rows_unchanged(before, Row.PARAM)
    scene.assert_surroundings()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_adams_bias_corrections_are_computed_in_double(operations, device, dtype):
    """With betas so close to 1, 1 - beta ** t has no more than two or three correct digits in float32."""
    options = AdamOptions(1.0, 0.99999, 0.9999999, 1e-8, 0.0, False, False, False)
    scene = Scene([(100,)], dtype, device)
    scene.begin_ascent()
    perturb_everything(operations, scene, rho=0.0)
    scene.give_state(options, [3])
    before = scene.copy_rows()
    update_(operations, scene, [options])
    assert_updated(scene, [options], before, [3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_arithmetic_is_rounded_once(operations, device, dtype):
    """An update of a step that is lost if intermediate results are rounded to ``dtype``.

    In bfloat16, 1 + 2^-9 is 1. Here each term alone is that small, and only their sum shows.
    """
    tiny = torch.finfo(dtype).eps / 4
    scene = Scene([(64,)], dtype, device)
    with torch.no_grad():
        scene.params[0].fill_(1.0)
        scene.grads[0].fill_(-1.0)
    scene.note_start()
    scene.grad_copies = [g.clone() for g in scene.grads]
    scene.begin_ascent()
    perturb_everything(operations, scene, rho=0.0)
    # Decay and gradient: 1 + 3 * tiny + tiny.
    options = SGDOptions(tiny, 0.0, 0.0, -3.0, False, False)
    update_(operations, scene, [options])
    expected, _ = oracle.sgd(scene.originals[0], scene.grads[0], None, lr=tiny, weight_decay=-3.0)
    assert float(expected[0]) == 1 + 4 * tiny
    assert_same_bits(scene.params[0], expected.to(dtype))


# ---- what an unfused base is given ----


@pairwise(dtype=EVERY_DTYPE, descent=EVERY_DESCENT, offset=OFFSETS)
def test_preparing_an_unfused_base(operations, device, dtype, descent, offset):
    """Weights back, gradients combined, the method state kept, and what is decoupled in the first gradient's place."""
    scene = Scene(SHAPES["mixed"], dtype, device, offset, groups=[0, 1] * 4)
    scene.begin_ascent(perturb=[True, False])
    perturb_everything(operations, scene)
    scene.give_rows()
    before = scene.copy_rows()
    descent = descent_by(descent, scene)
    operations.restore_and_update_(scene.table, Update.NONE, [], descent)
    assert_same_bits(scene.params, scene.originals, "weights")
    for i in range(len(scene.shapes)):
        assert_prepared(scene, i, descent, before)
    scene.assert_rows_unchanged(before, Row.PARAM, Row.GRAD, Row.FIRST_GRAD, Row.METHOD_STATE)
    scene.canaries.assert_alive()


def assert_prepared(scene, i, descent, before):
    direction = Direction(scene, i, descent, before)
    assert_within(scene.grads[i], direction.grad, before[Row.GRAD][i], f"gradient of {i}", direction.size)
    was = before[Row.METHOD_STATE][i]
    if direction.state is None:
        assert_same_bits(scene.table.method_state[i], was, f"method state of {i}")
    else:
        assert_within(scene.table.method_state[i], direction.state, was, f"method state of {i}", direction.state_size)
    was = before[Row.FIRST_GRAD][i]
    if direction.move is None:
        assert_same_bits(scene.table.first_grads[i], was, f"first gradient of {i}")
    else:
        assert_within(scene.table.first_grads[i], direction.move, was, f"move of {i}", direction.move_size)
