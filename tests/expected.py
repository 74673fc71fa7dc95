"""What the float64 oracle expects of the five operations over a scene, and the checks that it is so."""

import math

import oracle
import pytest
import torch
from checks import assert_same_bits, assert_within
from scene import ASCENT, ASCENTS, DESCENT, UPDATES, update_

from fastsam.spec import (
    NONE,
    PERTURBATION,
    Ascent,
    Map,
    Row,
    SGDOptions,
)


def mapped(form, x, w, coefficients):
    """``map(x)`` in float64."""
    scale, term = coefficients[ASCENT.SCALE], coefficients[ASCENT.TERM]
    if form.map == Map.POWER:
        return x.sign() * (scale * x).abs() ** term
    if form.map == Map.ADAPTIVE:
        return (scale * w.abs() + term) ** 2 * x
    return x


def expected_ascent(scene, i, ascent):
    """The oracle's weights; of a form also the sum of the sizes of what they are made of."""
    form, w = ascent.form, scene.params[i].double()
    start = (scene.backups[i] if form.y == PERTURBATION else scene.starts[i]).double()
    if ascent.norm is not None:
        rho, adaptive, maximize, _ = ascent.options[scene.groups[i]]
        e = oracle.perturbed(w, scene.grads[i], float(ascent.norm), float(rho), adaptive, maximize) - w
        return start + e, None
    x, y, coefficients = scene.operand(form.x, i), scene.operand(form.y, i), ascent.coefficients[i]
    if x is None:
        return start, start.abs()
    first = coefficients[ASCENT.A] * mapped(form, x, w, coefficients)
    second = torch.zeros_like(x) if y is None else coefficients[ASCENT.B] * y
    return start + first + second, start.abs() + first.abs() + second.abs()


def assert_perturbed(scene, expected):
    """The weights are ``expected`` (of :func:`expected_ascent`, by index), rounded as the table rounds."""
    for i, (want, term) in expected.items():
        what = f"weights of {i}"
        assert_within(scene.params[i], want, scene.originals[i], what, term, stochastic=scene.table.stochastic)


def expected_update(options, w, g, moments, step):
    """The oracle's new weights and moments after ``step`` updates."""
    named = options._asdict()
    del named["rounding_seed"]
    if isinstance(options, SGDOptions):
        w, buffer = oracle.sgd(w, g, moments[0] if step else None, **named)
        return w, [buffer, None, None]
    named["betas"] = named.pop("beta1"), named.pop("beta2")
    if not step:
        moments = [torch.zeros_like(w) for _ in moments[: 3 if options.amsgrad else 2]] + [None] * (not options.amsgrad)
    w, moments = oracle.adam(w, g, moments, step + 1, **named)
    return w, list(moments)


class Direction:
    """What a descent makes of a parameter's gradient, in float64; without a part in it, the gradient itself."""

    def __init__(self, scene, i, descent, rows):
        x = scene.operand(Row.GRAD, i, rows)
        self.grad, self.size, self.state, self.move = x, x.abs(), None, None
        if descent is None:
            return
        form, c = descent.form, descent.coefficients[i]
        y, first, state = (scene.operand(row, i, rows) for row in (form.y, Row.FIRST_GRAD, Row.METHOD_STATE))
        if (form.y != NONE and y is None) or (form.keeps and (first is None or state is None)):
            return
        y = torch.zeros_like(x) if y is None else y
        self.grad = c[DESCENT.A] * x + c[DESCENT.B] * y
        self.size = (c[DESCENT.A] * x).abs() + (c[DESCENT.B] * y).abs()
        if form.keeps:
            terms = [c[DESCENT.KEEP_X] * x, c[DESCENT.KEEP_FIRST] * first, c[DESCENT.KEEP_STATE] * state]
            self.state, self.state_size = sum(terms), sum(t.abs() for t in terms)
        if form.decoupled:
            terms = [c[DESCENT.DECOUPLED_X] * x, c[DESCENT.DECOUPLED_Y] * y]
            self.move, self.move_size = sum(terms), sum(t.abs() for t in terms)


def assert_updated(scene, options, before, steps, grad_scale=1.0, descent=None):
    """Weights, masters, state, method state and counts are the oracle's, from those in ``before``."""
    rows, table = before, scene.table
    for i, (start, g, step) in enumerate(zip(scene.starts, scene.grads, steps, strict=True)):
        moments = [rows[Row.STATE + k][i] for k in range(3)]
        if g is None:
            assert_same_bits(scene.params[i], scene.originals[i], f"weights of {i}")
            assert_same_bits([slot[i] for slot in table.state], moments, f"state of {i}")
            assert_same_bits(table.steps[i], rows[Row.STEP][i], f"count of {i}")
            continue
        _assert_parameter_updated(scene, i, options[scene.groups[i]], start, rows, step, grad_scale, descent)
    scene.assert_surroundings()


def _assert_parameter_updated(scene, i, group, start, before, step, grad_scale, descent):
    table = scene.table
    rounding = {"stochastic": table.stochastic and not table.has_masters}
    direction = Direction(scene, i, descent, before)
    g, size = direction.grad / grad_scale, direction.size / grad_scale
    old = [before[Row.STATE + k][i] for k in range(3)]
    expected, moments = expected_update(group, start.double(), g, old, step)
    term = None
    if descent is not None:
        term = start.double().abs() + (expected - start.double()).abs() + 0.3 * size
    if direction.move is not None:
        expected = expected - direction.move
        term = term + 2 * direction.move_size
    weights = table.masters[i] if table.has_masters else scene.params[i]
    assert_within(weights, expected, start, f"weights of {i}", term, **rounding)
    if table.has_masters:
        assert_same_bits(scene.params[i], table.masters[i].to(scene.dtype), f"rounded master of {i}")
    for k, (new, moment, first) in enumerate(zip((slot[i] for slot in table.state), moments, old, strict=True)):
        assert (new is None) == (moment is None)
        if new is not None:
            of = None if descent is None else size.square() if k else size
            assert_within(new, moment, first, f"state {k} of {i}", of, **rounding)
    if table.steps[i] is not None:
        assert table.steps[i] == step + 1
    was = before[Row.METHOD_STATE][i]
    if direction.state is None:
        assert_same_bits(table.method_state[i], was, f"method state of {i}")
    else:
        assert_within(
            table.method_state[i], direction.state, was, f"method state of {i}", direction.state_size, **rounding
        )


def assert_whole_step(operations, scene):
    """All operations in the order of a step."""
    scene.begin_ascent()
    norm = operations.grad_norm([scene.table], [ASCENTS["sam"]])
    assert float(norm) == pytest.approx(math.hypot(*(float(g.double().norm()) for g in scene.grads)), rel=1e-9)
    ascent = Ascent([ASCENTS["sam"]._replace(rho=0.05 * float(norm))], norm)
    expected = {i: expected_ascent(scene, i, ascent) for i in range(len(scene.params))}
    operations.perturb_(scene.table, ascent)
    assert_same_bits(scene.backups, scene.starts, "backups")
    assert_perturbed(scene, expected)
    operations.restore_(scene.table)
    assert_same_bits(scene.params, scene.originals, "restored")
    for param in scene.params:
        param.fill_(torch.nan)
    steps = [1] * len(scene.params)
    scene.give_state(UPDATES["sgd-nesterov"], steps)
    before = scene.copy_rows()
    update_(operations, scene, [UPDATES["sgd-nesterov"]])
    assert_updated(scene, [UPDATES["sgd-nesterov"]], before, steps)


def dot(x, y):
    """Summed exactly."""
    return math.fsum((x * y).flatten().tolist())
