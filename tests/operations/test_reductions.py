"""The norm and the dot products of every backend against the float64 oracle: no optimizer here."""

import math

import oracle
import pytest
import torch
from checks import assert_same_bits
from expected import dot, mapped
from pairwise import pairwise
from scene import (
    ASCENT_COLUMNS,
    CHUNK,
    EVERY_DTYPE,
    FORMS,
    OFFSETS,
    SHAPES,
    STORED,
    UPDATES,
    Scene,
    combination,
    every_dtype,
    every_stored,
)

from fastsam.spec import (
    NONE,
    AscentOptions,
    DescentForm,
    Row,
)

pytestmark = pytest.mark.usefixtures("small_chunks")
SOME_SHAPES = {name: SHAPES[name] for name in ("scalar", "blocks", "mixed", "chunks")}
ADAPTIVE = {"sam": False, "asam": True}


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
        (torch.bfloat16, 2.0**-70),
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


@pytest.mark.parametrize("sizes", [(0.0,), (1e38, 1.0, 1e-30, 0.0), (1e-39, 1e-30)], ids=str)
def test_each_chunk_has_a_range_of_its_own(operations, device, sizes):
    """And numbers of any size beside each other, down to 0 and to those below bfloat16's normal ones."""
    scene = Scene([(CHUNK * len(sizes),), (CHUNK * len(sizes),)], torch.bfloat16, device)
    scene.begin_ascent()
    with torch.no_grad():
        for chunk, size in zip(scene.params[0].grad.chunk(len(sizes)), sizes, strict=True):
            chunk *= size
        scene.params[1].grad *= torch.tensor(sizes, device=device).repeat(CHUNK).bfloat16()
    norm = operations.grad_norm([scene.table], [AscentOptions(0.05, False, False)])
    expected = oracle.norm(scene.originals, scene.grads, [False, False])
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
