"""The three measures against closed forms and brute force; what they leave alone; what they refuse."""

import math
import warnings

import pytest
import torch
from checks import assert_same_bits
from problem import Stop
from torch import nn
from torch.nn import functional as F

from fastsam import FastSAM, sharpness
from fastsam.sharpness.search import checkpoints


class Quadratic(nn.Module):
    """``(w - c)' A (w - c) / 2`` as a model, whose input is a factor."""

    def __init__(self, w, A, c=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.register_buffer("A", torch.tensor(A, dtype=torch.float64))
        self.register_buffer("c", torch.tensor(c, dtype=torch.float64))

    def forward(self, factor):
        moved = self.w - self.c
        return factor * (moved @ self.A @ moved) / 2


def mean_of(output, target):
    return output.mean()


FACTORS = [(torch.ones(3, dtype=torch.float64), torch.zeros(3)), (torch.ones(5, dtype=torch.float64), torch.zeros(5))]
A = [[3.0, 0.5], [0.5, 1.0]]
W = [0.7, -0.4]
RHO = 0.3


@pytest.fixture
def quadratic():
    return Quadratic(W, A)


def net(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
        data = [(torch.randn(8, 4), torch.randint(3, (8,))), (torch.randn(5, 4), torch.randint(3, (5,)))]
    return model, data


# ---- values ----


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("adaptive", [False, True])
def test_ascent_of_quadratic(quadratic, p, adaptive):
    w, matrix = quadratic.w.detach(), quadratic.A
    scale = w.abs() if adaptive else torch.ones_like(w)
    slope = scale * (matrix @ w)
    e = RHO * scale * (slope.sign() if p == math.inf else slope / slope.norm())
    expected = ((w + e) @ matrix @ (w + e) - w @ matrix @ w) / 2
    found = sharpness.ascent(quadratic, mean_of, FACTORS, RHO, p=p, adaptive=adaptive)
    assert found.value == pytest.approx(expected.item(), rel=1e-9)
    assert found.loss == pytest.approx((w @ matrix @ w / 2).item(), rel=1e-12)


def test_closure_is_data(quadratic):
    one = torch.ones((), dtype=torch.float64)
    found = sharpness.ascent(quadratic, None, lambda: quadratic(one), RHO)
    assert found.value == pytest.approx(sharpness.ascent(quadratic, mean_of, FACTORS, RHO).value, rel=1e-12)
    with pytest.raises(ValueError, match=r"m=2 .* a closure cannot be divided"):
        sharpness.ascent(quadratic, None, lambda: quadratic(one), RHO, m=2)


def brute_force(model, scale, p, rho=RHO):
    """The largest rise over a fine grid of the ball's boundary (a convex function is largest there)."""
    t = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    if p == math.inf:
        one = torch.ones_like(t)
        d = torch.cat([torch.stack(pair, 1) for pair in ((t, one), (t, -one), (one, t), (-one, t))])
    else:
        d = torch.stack([(math.pi * t).cos(), (math.pi * t).sin()], 1)
    w = model.w.detach()
    ends = w + rho * scale * d
    return ((ends @ model.A * ends).sum(1).max() - w @ model.A @ w).item() / 2


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("w", [W, [0.1, 0.02], [-0.01, 0.5]], ids=str)
def test_worst_of_quadratic_is_brute_force(w, p, adaptive):
    model = Quadratic(w, A)
    scale = model.w.detach().abs() if adaptive else torch.ones(2)
    found = sharpness.worst(model, mean_of, FACTORS, RHO, p=p, adaptive=adaptive, steps=30, restarts=6)
    assert found.value == pytest.approx(brute_force(model, scale, p), rel=1e-5)


def test_worst_leaves_a_saddle():
    """At w the gradient is zero: the first start is random then."""
    model = Quadratic([0.0, 0.0], [[2.0, 0.0], [0.0, -1.0]])
    found = sharpness.worst(model, mean_of, FACTORS, RHO, steps=30)
    assert found.value == pytest.approx(RHO**2 * 2 / 2, rel=1e-4)
    hill = Quadratic([0.0, 0.0], [[-2.0, 0.0], [0.0, -1.0]])
    assert sharpness.worst(hill, mean_of, FACTORS, RHO).value == 0.0, "w itself is in the ball"


def test_average_of_quadratic(quadratic):
    """On the circle the mean of z'Az/2 is trace / 4, and that of the gradient's part is 0."""
    found = sharpness.average(quadratic, mean_of, FACTORS, RHO, samples=400)
    expected = RHO**2 * torch.tensor(A).trace().item() / 4
    assert abs(found.value - expected) < 4 * found.standard_error
    assert 0 < found.standard_error < 0.03
    again = sharpness.average(quadratic, mean_of, FACTORS, RHO, samples=400)
    assert again == found
    assert sharpness.average(quadratic, mean_of, FACTORS, RHO, samples=400, seed=1) != found


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("m", [None, 3])
def test_worst_is_at_least_ascent(p, m):
    for seed in range(2):
        model, data = net(seed)
        first = sharpness.ascent(model, F.cross_entropy, data, 0.05, p=p, m=m)
        assert sharpness.worst(model, F.cross_entropy, data, 0.05, p=p, m=m, steps=3).value >= first.value > 0


def test_m_sharpness_is_mean_over_parts():
    model, data = net()
    parts = [(x[i : i + 3], y[i : i + 3]) for x, y in data for i in range(0, len(x), 3)]
    each = [(sharpness.ascent(model, F.cross_entropy, [part], 0.1), len(part[0])) for part in parts]
    expected = sum(found.value * n for found, n in each) / 13
    found = sharpness.ascent(model, F.cross_entropy, data, 0.1, m=3)
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.settings["m"] == 3
    assert found.value > sharpness.ascent(model, F.cross_entropy, data, 0.1).value


@pytest.mark.parametrize("adaptive", [False, True])
def test_ascent_is_the_optimizers(adaptive):
    """The same e as FastSAM's, on the same data."""
    model, data = net()
    model.eval()
    x, y = data[0]
    optimizer = FastSAM(model.parameters(), rho=0.2, adaptive=adaptive, lr=0.0)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.first_step()
    rise = F.cross_entropy(model(x), y).item() - loss.item()
    optimizer.restore()
    found = sharpness.ascent(model, F.cross_entropy, data[:1], 0.2, adaptive=adaptive)
    assert found.value == pytest.approx(rise, rel=1e-5)


def test_batches_are_weighted_by_their_sizes():
    model, data = net()
    whole = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    for measure in (sharpness.ascent, sharpness.average):
        found, expected = (measure(model, F.cross_entropy, d, 0.1) for d in (data, whole))
        assert found.value == pytest.approx(expected.value, rel=1e-4)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_batches_may_be_mappings():
    model, data = net()

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, y):
            return F.cross_entropy(self.inner(x), y)

    batches = [{"x": x, "y": y} for x, y in data]
    found = sharpness.ascent(Named(), lambda output, batch: output, batches, 0.1)
    assert found.value == pytest.approx(sharpness.ascent(model, F.cross_entropy, data, 0.1).value, rel=1e-6)


def test_scale_of_logits_has_no_part_with_normalized_logits():
    model, data = net()
    loss_fn = sharpness.normalized_logits(F.cross_entropy)
    before = sharpness.worst(model, loss_fn, data, 0.1, adaptive=True, steps=3)
    with torch.no_grad():
        model[-1].weight.mul_(10)
        model[-1].bias.mul_(10)
    after = sharpness.worst(model, loss_fn, data, 0.1, adaptive=True, steps=3)
    assert after.value == pytest.approx(before.value, rel=1e-4)


# ---- what is left alone ----


def everything(model):
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
    return [t.detach().clone() for t in tensors]


MEASURES = {
    "ascent": sharpness.ascent,
    "worst": lambda *args, **options: sharpness.worst(*args, **options, steps=3),
    "average": lambda *args, **options: sharpness.average(*args, **options, samples=3),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_model_is_as_before(measure, train):
    model, data = net()
    model.train()
    model[3].eval()
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    grads = [p.grad for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    before = everything(model)
    modes = [module.training for module in model.modules()]
    found = measure(model, F.cross_entropy, data, 0.1, train=train)
    assert math.isfinite(found.value)
    assert_same_bits(everything(model), before)
    assert [p.grad for p in model.parameters()] == grads or all(
        p.grad is g for p, g in zip(model.parameters(), grads, strict=True)
    )
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [module.training for module in model.modules()] == modes
    assert measure(model, F.cross_entropy, data, 0.1, train=train) == found, "dropout's masks are the same"


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("call", [2, 4, 7])
def test_model_is_as_before_after_an_exception(error, call):
    model, data = net()
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    before = everything(model)
    calls = 0

    def loss_fn(output, target):
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return F.cross_entropy(output, target)

    with pytest.raises(error):
        sharpness.worst(model, loss_fn, data, 0.1, train=True)
    assert calls == call
    assert_same_bits(everything(model), before)


def test_shuffled_loader_and_frozen_parameters():
    model, data = net()
    model[0].weight.requires_grad_(False)
    samples = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    loader = torch.utils.data.DataLoader(samples, batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    first, second = (sharpness.ascent(model, F.cross_entropy, loader, 0.1, m=4) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_is_measured_in_float32():
    model, data = net()
    half = net()[0].bfloat16()
    model.load_state_dict(half.state_dict())  # the same weights, in float32
    before = everything_but_grads(half)
    low = [(x.bfloat16(), y) for x, y in data]
    same = [(x.bfloat16().float(), y) for x, y in data]
    found = sharpness.ascent(half, F.cross_entropy, low, 1e-3)
    assert found.value == pytest.approx(sharpness.ascent(model, F.cross_entropy, same, 1e-3).value, rel=1e-6)
    assert_same_bits(everything_but_grads(half), before)
    with pytest.raises(ValueError, match="float32 copy, which a closure does not use; pass model, loss_fn and data"):
        sharpness.ascent(half, None, lambda: half(low[0][0]).sum(), 1e-3)


def everything_but_grads(model):
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


# ---- results ----


def test_result_prints_and_converts(quadratic):
    found = sharpness.average(quadratic, mean_of, FACTORS, RHO, samples=4, seed=3)
    text = str(found)
    assert text.startswith("average sharpness ")
    assert "rho=0.3" in text
    assert "samples=4" in text
    assert " +- " in text
    assert found.to_dict()["settings"] == {"rho": 0.3, "p": 2, "adaptive": False, "samples": 4, "seed": 3}
    assert found.to_dict()["value"] == float(found)


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"model": 1}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"data": iter(FACTORS)}, TypeError, "only once: pass a DataLoader or list"),
        ({"data": 3}, TypeError, "data must be an iterable of batches, got int"),
        ({"data": []}, ValueError, "data is empty"),
        ({"data": [(1, 2, 3)]}, TypeError, r"must be \(input, target\) or a mapping, got a tuple of 3"),
        ({"loss_fn": None}, TypeError, "without a loss_fn, data must be a closure"),
        ({"loss_fn": 2}, TypeError, "loss_fn must be a function"),
        ({"loss_fn": lambda output, target: output}, TypeError, "tensor of one element"),
        ({"rho": 0.0}, ValueError, "rho must be > 0 and finite, got 0.0"),
        ({"rho": -1.0}, ValueError, "rho must be > 0"),
        ({"rho": math.nan}, ValueError, "rho must be > 0"),
        ({"p": 3}, ValueError, "p must be 2 or math.inf, got 3"),
        ({"m": 0}, ValueError, "m must be a whole number >= 1"),
        ({"steps": 0}, ValueError, "steps must be a whole number >= 1"),
        ({"restarts": 0}, ValueError, "restarts must be a whole number >= 1"),
    ],
)
def test_refusals_name_argument_and_value(quadratic, change, error, reason):
    arguments = {"model": quadratic, "loss_fn": mean_of, "data": FACTORS, "rho": RHO} | change
    with pytest.raises(error, match=reason):
        sharpness.worst(**arguments)


def test_refuses_model_without_parameters(quadratic):
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        sharpness.ascent(quadratic.requires_grad_(False), mean_of, FACTORS, RHO)
    with pytest.raises(ValueError, match="samples must be >= 2, got 1"):
        sharpness.average(quadratic.requires_grad_(True), mean_of, FACTORS, RHO, samples=1)


def test_zero_gradient_is_nan_and_a_warning():
    model = Quadratic([0.0, 0.0], A)
    with pytest.warns(RuntimeWarning, match="gradient at w is zero or not finite"):
        found = sharpness.ascent(model, mean_of, FACTORS, RHO)
    assert math.isnan(found.value)
    assert found.loss == 0.0


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_nan_and_a_warning(quadratic, measure, value):
    with pytest.warns(RuntimeWarning, match="the loss at w is"):
        found = measure(quadratic, lambda output, target: output.mean() * value, FACTORS, RHO)
    assert math.isnan(found.value)


def test_gradient_that_is_not_finite_is_nan_and_a_warning():
    model = nn.Linear(1, 1)
    data = [(torch.ones(1, 1), torch.zeros(1))]

    def loss_fn(output, target):  # 0 at w, with an infinite slope
        return (output - output.detach()).abs().sqrt().sum()

    for measure in (sharpness.ascent, sharpness.worst):
        with pytest.warns(RuntimeWarning, match="zero or not finite"):
            assert math.isnan(measure(model, loss_fn, data, RHO).value)


def test_no_warnings_otherwise(quadratic):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for measure in MEASURES.values():
            measure(quadratic, mean_of, FACTORS, RHO)


def test_checkpoints_come_ever_more_often():
    found = checkpoints(100)
    assert found[:3] == [22, 41, 58]
    assert found[-1] < 100
    assert checkpoints(1) == [1]
