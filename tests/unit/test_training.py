"""sam_step and Passes: micro-batches, scaling, clipping, autocast in the right order, against the float64 oracle."""

import copy
from contextlib import contextmanager
from functools import partial

import oracle
import pytest
import torch
from registry import METHODS
from torch import nn
from trajectory import Network, assert_same_trajectory, detached, follow_oracle, optimizer_for

from fastsam import FastSAM, methods
from fastsam.training import Passes, sam_step

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = (slice(0, 4), slice(4, 16))  # of unlike size: the step's loss is the average over both
GROUP = {"rho": 0.3, "lr": 0.02, "momentum": 0.9}
SCALE = 1024.0
CLIP = 0.2  # less than most norms here
STEPS = 3


def scaler_of(scale=SCALE):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def clipped(grads, limit):
    factor = min(1.0, limit / (oracle.length(grads) + 1e-6))
    return [factor * g for g in grads]


def averaged(network, weights, step, clip=None):
    """The oracle's gradient of a step over PARTS."""
    grads = [network.gradient(weights, step, part) for part in PARTS]
    mean = [sum(gs) / len(PARTS) for gs in zip(*grads, strict=True)]
    return mean if clip is None else clipped(mean, clip)


def train(network, groups, *, scale=None, clip=None, dtype=torch.float64, adamw=False, **options):
    params = network.params(dtype)
    optimizer = optimizer_for(params, "auto", groups, adamw=adamw, **options)
    scaler = None if scale is None else scaler_of(scale)
    trajectory = []
    for step in range(STEPS):
        loss_fn = lambda _, part, step=step: network.loss(params, step, part)  # noqa: E731
        sam_step(nn.Identity(), loss_fn, PARTS, optimizer, scaler=scaler, max_grad_norm=clip)
        trajectory.append(detached(params))
    return trajectory


@pytest.mark.parametrize(
    ("scale", "clip"),
    [
        pytest.param(None, None, id="plain", marks=pytest.mark.thorough),
        pytest.param(SCALE, None, id="scaled", marks=pytest.mark.thorough),
        pytest.param(SCALE, CLIP, id="scaled and clipped"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_methods_over_all_micro_batches(name, scale, clip):
    network, groups = Network("cpu"), [GROUP] * len(Network.SHAPES)
    expected = follow_oracle(network, METHODS[name].oracle, groups, gradient=partial(averaged, network, clip=clip))
    trajectory = train(network, groups, scale=scale, clip=clip, method=METHODS[name].method)
    assert_same_trajectory(trajectory, expected, rtol=1e-11)


@pytest.mark.parametrize("scale", [None, SCALE], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamw_with_an_interval(dtype, scale):
    network, groups = Network("cpu"), [{"rho": 0.3, "lr": 0.01}] * len(Network.SHAPES)
    gradient = partial(averaged, network, clip=CLIP)
    expected = follow_oracle(network, oracle.at_intervals(oracle.sam, 2), groups, adamw=True, gradient=gradient)
    trajectory = train(network, groups, scale=scale, clip=CLIP, dtype=dtype, adamw=True, interval=2)
    assert_same_trajectory(trajectory, expected, rtol=1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", ["gsam", "amp"])
def test_scaled_gradients_that_are_not_clipped(name):
    test_a_step_is_the_methods_over_all_micro_batches(name, SCALE, None)


# ---- a module ----


def make(seed=0, dropout=0.0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
    return model, FastSAM(model.parameters(), **{"rho": 0.1, "lr": 0.1, "momentum": 0.9, **options})


def batches(count=2):
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(4, n, generator=generator) for n in (5, 3)) for _ in range(count)]


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_loss_is_the_first_passs_average():
    model, optimizer = make()
    with torch.no_grad():
        expected = torch.stack([loss_fn(model, batch) for batch in batches()]).mean()
    loss = sam_step(model, loss_fn, iter(batches()), optimizer)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_two_phases_under_autocast(dtype):
    model, optimizer = make()
    sam_step(model, loss_fn, batches(1), optimizer, autocast=torch.autocast("cpu", dtype))
    expected, other = make()
    for phase in (other.first_step, other.second_step):
        with torch.autocast("cpu", dtype):
            loss = loss_fn(expected, batches(1)[0])
        loss.backward()
        phase()
    assert torch.equal(weights_of(model), weights_of(expected))


@pytest.mark.parametrize("method", [methods.SAM(), methods.GSAM(), methods.AMP(), methods.RandomSAM()], ids=str)
def test_an_overflow_skips_the_update_and_lowers_the_scale(method):
    model, optimizer = make(method=method)
    scaler, before = scaler_of(), weights_of(model)
    sam_step(model, lambda m, b: loss_fn(m, b) * float("inf"), batches(), optimizer, scaler=scaler, max_grad_norm=1.0)
    assert torch.equal(weights_of(model), before)
    assert not optimizer.perturbed
    assert scaler.get_scale() == 512
    sam_step(model, loss_fn, batches(), optimizer, scaler=scaler, max_grad_norm=1.0)
    assert not torch.equal(weights_of(model), before)


def test_an_overflow_of_the_first_pass_alone_is_a_step_at_w():
    model, optimizer = make(method=methods.GSAM())
    calls = []

    def overflows_once(module, batch):
        calls.append(batch)
        return loss_fn(module, batch) * (float("inf") if len(calls) == 1 else 1.0)

    scaler = scaler_of()
    sam_step(model, overflows_once, batches(1), optimizer, scaler=scaler)
    expected, base = make()
    loss_fn(expected, batches(1)[0]).backward()
    base.base_optimizer.step()
    torch.testing.assert_close(weights_of(model), weights_of(expected), rtol=0, atol=1e-7)
    assert scaler.get_scale() == 1024


@pytest.mark.parametrize(
    ("method", "number"),
    [
        *((methods.MomentumSAM(), number) for number in range(2)),
        *((methods.SAM(), number) for number in range(4)),
        *((methods.SAM(inner_steps=2), number) for number in range(6)),
    ],
    ids=str,
)
def test_an_exception_leaves_everything_as_it_was(method, number):
    model, optimizer = make(method=method)
    sam_step(model, loss_fn, batches(), optimizer)
    before, state = weights_of(model), copy.deepcopy(optimizer.state_dict()["state"])
    calls = []

    def fails(module, batch):
        calls.append(batch)
        if len(calls) == number + 1:
            raise KeyError("mine")
        return loss_fn(module, batch)

    with pytest.raises(KeyError, match="mine"):
        sam_step(model, fails, batches(), optimizer)
    assert torch.equal(weights_of(model), before)
    assert not optimizer.perturbed
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    sam_step(model, loss_fn, batches(), optimizer)


@pytest.mark.parametrize("scaler", [None, scaler_of()], ids=["plain", "scaler"])
def test_both_losses_and_the_norm_are_noted(scaler):
    model, optimizer = make()
    sam_step(model, loss_fn, batches(), optimizer, scaler=scaler)
    expected, other = make()

    def closure():
        other.zero_grad()
        loss = sum(loss_fn(expected, batch) for batch in batches()) / 2
        loss.backward()
        return loss

    other.step(closure)
    torch.testing.assert_close(optimizer.last_ascent, other.last_ascent)


def test_random_numbers_are_replayed_if_the_optimizer_says_so():
    def masks(replay_rng):
        model, optimizer = make(dropout=0.5, replay_rng=replay_rng)
        drawn = []
        model[2].register_forward_hook(lambda _, inputs, output: drawn.append(output == 0))
        torch.manual_seed(5)
        sam_step(model, loss_fn, batches(), optimizer)
        return drawn, torch.get_rng_state()

    first, second, *repeated = masks(replay_rng=True)[0]
    assert torch.equal(first, repeated[0])
    assert torch.equal(second, repeated[1])
    assert not torch.equal(first, second)
    assert not torch.equal(*masks(replay_rng=False)[0][::2])


def test_gradients_are_reduced_once_a_pass():
    class Parallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.reduces, self.log = module, True, []

        def forward(self, x):
            self.log.append(self.reduces)
            return self.module(x)

        @contextmanager
        def no_sync(self):
            self.reduces = False
            yield
            self.reduces = True

    model, optimizer = make()
    parallel = Parallel(model)
    sam_step(parallel, loss_fn, batches(3), optimizer)
    assert parallel.log == 2 * [False, False, True]


def test_no_micro_batch_is_refused():
    model, optimizer = make()
    with pytest.raises(ValueError, match="micro_batches is empty"):
        sam_step(model, loss_fn, [], optimizer)


def test_a_loop_of_its_own_with_passes():
    model, optimizer = make()
    passes = Passes(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        for batch in batches():
            passes.first(lambda batch=batch: (loss_fn(model, batch) / 2).backward())
        passes.repeat()
        passes.update()
    expected, other = make()
    for _ in range(3):
        sam_step(expected, loss_fn, batches(), other)
    assert torch.equal(weights_of(model), weights_of(expected))
