"""The update of every backend, and what an unfused base is given, against the float64 oracle: no optimizer here."""

import math

import oracle
import pytest
import torch
from checks import assert_same_bits, assert_within
from expected import Direction, assert_updated
from pairwise import pairwise
from scene import (
    ASCENTS,
    DESCENTS,
    EVERY_DTYPE,
    OFFSETS,
    SHAPES,
    STORED,
    UPDATES,
    Scene,
    descent_by,
    norm_of,
    perturb_everything,
    scalar,
    update_,
)

from fastsam.spec import (
    AdamOptions,
    Ascent,
    Row,
    SGDOptions,
    Update,
)

pytestmark = pytest.mark.usefixtures("small_chunks")
EVERY_DESCENT = {"no-descent": None} | {name: name for name in DESCENTS}
GRAD_SCALES = {"unscaled": None, "scaled-4": 4.0, "scaled-3": 3.0}


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


def test_a_nan_in_the_largest_second_moment_stays(operations, device):
    """As in torch.maximum."""
    options = UPDATES["adamw-amsgrad"]
    scene = Scene([(40,)], torch.float32, device)
    scene.begin_ascent()
    perturb_everything(operations, scene, rho=0.0)
    scene.give_state(options, [3])
    largest = scene.table.rows[Row(Row.STATE + 2)][0]
    largest[::3] = math.nan
    was_nan = largest.isnan()
    update_(operations, scene, [options])
    assert_same_bits(largest.isnan(), was_nan)


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
