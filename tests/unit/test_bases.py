"""Any base: which classes run fused, and that every other one runs as it does alone."""

import copy

import pytest
import torch
from checks import assert_same_bits
from problem import Matrices, Problem, assert_same_state, state_of
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastsam import FastSAM, backends
from fastsam.bases import FUSED, check_base
from fastsam.groups import GROUP_OPTIONS
from fastsam.spec import Update

pytestmark = pytest.mark.face

# What each class of torch.optim is built with here; small rates, so that nothing saturates.
OPTIONS = {
    "ASGD": {"lr": 0.05, "t0": 2},
    "Adafactor": {"lr": 0.01},
    "Adagrad": {"lr": 0.05, "initial_accumulator_value": 0.5, "lr_decay": 0.1},
    "Adam": {"lr": 0.01, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "amsgrad": True},
    "Adamax": {"lr": 0.01},
    "Muon": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "Rprop": {"lr": 0.01},
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
}
REFUSED = {
    "Adadelta": "its rho is not the perturbation's",
    "LBFGS": "it calls the closure itself, many times",
    "SparseAdam": "it takes sparse gradients only, which a perturbation cannot use",
}
NOT_HERE = {
    "Optimizer": "what all are derived from",
}


class Plain(torch.optim.SGD):
    """A subclass that changes nothing; that it does not is not for the package to know."""


class Signed(torch.optim.SGD):
    """A step of its own, from the signs of the gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
                    p.add_(p.grad.sign(), alpha=-group["lr"])


class Decorated(torch.optim.SGD):
    """A step around that of its parent."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(0.99)
        return super().step(closure)


class Own(torch.optim.Optimizer):
    """Nothing but the contract of torch.optim.Optimizer; its ``step`` takes no closure at all."""

    def __init__(self, params, lr=0.1, power=2):
        super().__init__(params, {"lr": lr, "power": power})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.abs().pow(group["power"]) * p.grad.sign(), alpha=group["lr"])


OWN = {
    "Plain": (Plain, {"lr": 0.1, "momentum": 0.9}),
    "Signed": (Signed, {"lr": 0.01}),
    "Decorated": (Decorated, {"lr": 0.1, "momentum": 0.9}),
    "Own": (Own, {"lr": 0.1, "power": 1.5}),
}
BASES = {name: (getattr(torch.optim, name), options) for name, options in OPTIONS.items() if hasattr(torch.optim, name)}
ALL = {**BASES, **OWN}


def test_every_class_of_torch_optim_is_accounted_for():
    classes = {name for name, value in vars(torch.optim).items() if isinstance(value, type)}
    assert classes == set(BASES) | set(REFUSED) | set(NOT_HERE)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    with pytest.raises(TypeError, match=f"base {name} is not supported"):
        check_base(getattr(torch.optim, name), {}, GROUP_OPTIONS)


class Refusing(torch.optim.SGD):
    """A step that raises before it writes anything."""

    @torch.no_grad()
    def step(self, closure=None):
        raise RuntimeError("Refusing does not like these gradients")


def test_a_base_that_raises_leaves_the_weights_as_they_were(backend, device):
    problem = Problem(device)
    optimizer = FastSAM(problem.params, Refusing, lr=0.1, backend=backend)
    start = problem.weights()
    with pytest.raises(RuntimeError, match="Refusing does not like these gradients"):
        problem.step(optimizer)
    assert not optimizer.perturbed
    assert_same_bits(problem.weights(), start)


def test_fused_are_exactly_three_classes():
    assert set(FUSED) == {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW}


def unfused(name):
    return name not in ("SGD", "Adam", "AdamW")


@pytest.mark.parametrize(("name", "base"), ALL.items(), ids=ALL)
def test_only_these_three_run_by_the_backends_update(backend, device, operations, monkeypatch, name, base):
    calls = []
    run = operations.restore_and_update_
    monkeypatch.setattr(
        operations, "restore_and_update_", lambda table, update, *a: (calls.append(update), run(table, update, *a))[1]
    )
    cls, options = base
    problem = Matrices(device)
    problem.step(FastSAM(problem.params, cls, backend=backend, **options))
    if unfused(name):
        assert set(calls) == {Update.NONE}
    else:
        assert set(calls) == {Update.SGD if name == "SGD" else Update.ADAM}


@pytest.mark.parametrize(("name", "base"), ALL.items(), ids=ALL)
@pytest.mark.parametrize("use", ["closure", "two-phase"])
def test_rho_0_is_the_base_alone(backend, device, name, base, use):
    """Bit for bit, over five steps: weights and state. The fused three so on ``reference`` only, by design."""
    cls, options = base
    mine, theirs = Matrices(device), Matrices(device)
    optimizer = FastSAM(mine.params, cls, rho=torch.tensor(0.0), backend=backend, **options)
    accepts = "foreach" in cls(theirs.params, **options).defaults
    alone = cls(theirs.params, **options, **({"foreach": False} if accepts and not unfused(name) else {}))
    for _ in range(5):
        mine.step(optimizer) if use == "closure" else mine.two_phase(optimizer)
        theirs.plain_step(alone)
        if unfused(name) or backend == "reference":
            assert_same_bits(mine.weights(), theirs.weights())
        else:
            torch.testing.assert_close(mine.weights(), theirs.weights(), rtol=1e-5, atol=1e-6)
    ours, expected = state_of(optimizer), state_of(alone)
    if unfused(name) or backend == "reference":
        assert_same_state(ours, expected)
    else:
        assert {i: sorted(entries) for i, entries in ours.items()} == {i: sorted(e) for i, e in expected.items()}


@pytest.mark.parametrize(("name", "base"), ALL.items(), ids=ALL)
def test_a_step_is_the_perturbation_and_the_bases_own_update(backend, device, name, base):
    """With the gradients of the perturbed weights, which are measured here; over three steps."""
    cls, options = base
    mine, theirs = Matrices(device), Matrices(device)
    optimizer = FastSAM(mine.params, cls, rho=0.3, backend=backend, **options)
    alone = cls(theirs.params, **options)
    for _ in range(3):
        passes = []

        def closure(passes=passes):
            optimizer.zero_grad()
            loss = mine.backward()
            passes.append([p.grad.clone() for p in mine.params])
            return loss

        optimizer.step(closure)
        first, second = passes
        assert not torch.equal(first[0], second[0])
        for p, g in zip(theirs.params, second, strict=True):
            p.grad = g.clone()
        alone.step()
        if unfused(name):
            assert_same_bits(mine.weights(), theirs.weights())
        else:
            torch.testing.assert_close(mine.weights(), theirs.weights(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("copied", [False, True], ids=["original", "copy"])
def test_state_that_a_base_makes_when_it_is_built_is_kept(backend, device, copied):
    problem = Problem(device)
    optimizer = FastSAM(problem.params, torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.5, backend=backend)
    if copied:
        problem.model, optimizer = copy.deepcopy((problem.model, optimizer))
    assert len(optimizer.state) == 4
    for p in problem.params:
        assert_same_bits(optimizer.state[p]["sum"], torch.full_like(p, 0.5).detach())
        assert optimizer.state[p]["step"] == 0
    problem.step(optimizer)
    assert all(optimizer.state[p]["step"] == 1 for p in problem.params)


@pytest.mark.parametrize(("name", "base"), ALL.items(), ids=ALL)
def test_hooks_of_the_base_do_not_run_a_second_time(backend, device, name, base):
    """torch puts hooks around the ``step`` of every class, so around the base's too."""
    cls, options = base
    problem = Matrices(device)
    optimizer = FastSAM(problem.params, cls, backend=backend, **options)
    calls = []
    optimizer.register_step_pre_hook(lambda o, a, k: calls.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, a, k: calls.append(("post", o)))
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: calls.append(("global-pre", o))),
        register_optimizer_step_post_hook(lambda o, a, k: calls.append(("global-post", o))),
    ]
    try:
        problem.step(optimizer)
    finally:
        for handle in handles:
            handle.remove()
    mine = [name for name, o in calls if o is optimizer]
    assert mine == ["global-pre", "pre", "post", "global-post"]
    # Decorated's call of its parent's step is hooked by torch itself, with or without FastSAM.
    others = [name for name, o in calls if o is not optimizer]
    assert others == (["global-pre", "global-post"] if name == "Decorated" else [])


def test_a_class_that_nothing_was_built_from_yet_has_no_hooks_to_skip(backend, device):
    """torch wraps ``step`` when a class is first built; FastSAM's own base is built like any other."""

    class Fresh(Own):
        @torch.no_grad()
        def step(self):
            super().step()

    problem = Problem(device)
    start = problem.weights()
    problem.step(FastSAM(problem.params, Fresh, backend=backend))
    assert all((a != b).any() for a, b in zip(problem.weights(), start, strict=True))


def test_several_optimizers_over_one_base_class_are_apart(backend, device):
    one, two = Problem(device), Problem(device, seed=2)
    first, second = (FastSAM(p.params, Signed, lr=0.01, backend=backend) for p in (one, two))
    untouched = two.weights()
    one.step(first)
    assert_same_bits(two.weights(), untouched)
    assert len(second.state) == 0


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=["plain", "fused", "foreach"])
def test_an_unfused_base_may_choose_its_own_implementation(backend, device, options):
    mine, theirs = Problem(device), Problem(device)
    optimizer = FastSAM(mine.params, torch.optim.Adagrad, rho=torch.tensor(0.0), lr=0.1, backend=backend, **options)
    alone = torch.optim.Adagrad(theirs.params, lr=0.1, **options)
    for _ in range(3):
        mine.step(optimizer)
        theirs.plain_step(alone)
    assert_same_bits(mine.weights(), theirs.weights())


def test_groups_of_an_unfused_base_have_its_options(backend, device):
    problem = Problem(device)
    groups = [{"params": problem.params[:2], "alpha": 0.5}, {"params": problem.params[2:], "rho": 0.7}]
    optimizer = FastSAM(groups, torch.optim.RMSprop, lr=0.1, backend=backend)
    assert [(g["alpha"], g["rho"]) for g in optimizer.param_groups] == [(0.5, 0.05), (0.99, 0.7)]
    extra = nn.Parameter(torch.zeros(2, device=device))
    optimizer.add_param_group({"params": [extra], "alpha": 0.1})
    assert optimizer.param_groups[2]["alpha"] == 0.1
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups


def test_auto_serves_every_base(device):
    for cls, options in ALL.values():
        problem = Matrices(device)
        start = problem.weights()
        problem.step(FastSAM(problem.params, cls, **options))
        assert not torch.equal(problem.weights()[0], start[0])
    assert backends.resolve("auto", device.type) is not None
