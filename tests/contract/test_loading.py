"""Checkpoints in both directions, between FastSAM and its base alone, loaded in full; state that is reset."""

import collections
import copy

import pytest
import torch
from checks import assert_same_bits, has_torchs_bits
from problem import (
    Problem,
    assert_one_with_its_base,
    assert_same_state,
    state_of,
)
from registry import STATEFUL_VARIANTS
from resumed import alone, assert_go_on_alike, fused, train
from torch import nn

from fastsam import FastSAM

pytestmark = pytest.mark.face


RESETS = {
    "clear": lambda o: o.state.clear(),
    "new": lambda o: setattr(o, "state", collections.defaultdict(dict)),
    "load": lambda o: o.load_state_dict({"state": {}, "param_groups": copy.deepcopy(o.state_dict()["param_groups"])}),
    "one-parameter": lambda o: o.state.pop(o.param_groups[0]["params"][1]),
}


@pytest.mark.parametrize("variant", STATEFUL_VARIANTS)
@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS)
def test_state_that_was_reset_starts_anew(backend, device, variant, reset):
    """Counts of steps too: torch.optim has no other memory than its state."""
    mine, theirs = Problem(device), Problem(device)
    optimizer, base = fused(mine, backend, variant), alone(theirs, variant)
    train(mine, optimizer, range(3))
    train(theirs, base, range(3))
    reset(optimizer)
    reset(base)
    assert_one_with_its_base(optimizer)
    assert_go_on_alike(backend, mine, optimizer, theirs, base)


@pytest.mark.parametrize("size", [1, 3])
def test_a_lazily_negated_state_tensor_is_updated(backend, device, size):
    """One that somebody put there: its memory holds other numbers than it has."""
    param = torch.nn.Parameter(torch.zeros(size, device=device))
    optimizer = FastSAM([param], rho=0.0, lr=1.0, momentum=0.5, backend=backend)
    buffer = torch.full((size,), 4.0, device=device)
    optimizer.state[param]["momentum_buffer"] = torch._neg_view(buffer)
    for expected in (-1.0, 0.5):
        param.grad = torch.ones_like(param)
        optimizer.step(lambda: param.sum())
        assert optimizer.state[param]["momentum_buffer"].tolist() == [expected] * size
    assert buffer.tolist() == [4.0] * size
    assert param.tolist() == [0.5] * size


def test_momentum_that_is_switched_on_later_starts_anew(backend, device):
    mine, theirs = Problem(device), Problem(device)
    options = {"lr": 0.1, "momentum": 0.0, "dampening": 0.5}
    optimizer = FastSAM(mine.params, rho=0.0, backend=backend, **options)
    base = torch.optim.SGD(theirs.params, foreach=False, **options)
    train(mine, optimizer, range(3))
    train(theirs, base, range(3))
    for each in (optimizer, base):
        each.param_groups[0]["momentum"] = 0.9
    assert_go_on_alike(backend, mine, optimizer, theirs, base)


def test_state_that_is_written_in_place_counts(backend, device):
    mine, theirs = Problem(device), Problem(device)
    optimizer, base = fused(mine, backend, "adam"), alone(theirs, "adam")
    for problem, each in ((mine, optimizer), (theirs, base)):
        train(problem, each, range(2))
        for p in problem.params:
            each.state[p]["exp_avg"].fill_(0.25)
            each.state[p]["step"].fill_(7.0)
    assert_go_on_alike(backend, mine, optimizer, theirs, base)
    assert float(optimizer.state[mine.params[0]]["step"]) == (9.0 if has_torchs_bits(backend, device) else 8.0)


def test_state_that_is_replaced_counts(backend, device):
    """Also where Python gives the new tensor the identity of the one that is gone."""
    mine, theirs = Problem(device), Problem(device)
    optimizer, base = fused(mine, backend, "sgd-momentum"), alone(theirs, "sgd-momentum")
    for problem, each in ((mine, optimizer), (theirs, base)):
        train(problem, each, range(2))
        for p in problem.params:
            entries, others = each.state[p], []
            identity = id(entries["momentum_buffer"])
            del entries["momentum_buffer"]
            for _ in range(50):
                others.append(torch.full_like(p, 0.25).detach())
                if id(others[-1]) == identity:
                    break
            entries["momentum_buffer"] = others[-1]
    assert_go_on_alike(backend, mine, optimizer, theirs, base)


def test_loaded_lr_is_used(backend, device):
    """The oldest fault of wrappers: groups of their own, whose lr nobody reads."""
    problem = Problem(device)
    optimizer = FastSAM(problem.params, lr=0.1, rho=0.0, backend=backend)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.param_groups[0]["lr"] = 0.0
    start = problem.weights()
    problem.step(optimizer)
    assert_same_bits(problem.weights(), start)


def test_two_optimizers_that_load_one_state_are_independent(backend, device):
    donor = Problem(device)
    source = donor.optimizer(backend, "adamw")
    train(donor, source, range(2))
    state = source.state_dict()
    problems = [Problem(device), Problem(device)]
    loaded = [p.optimizer(backend, "adamw") for p in problems]
    for optimizer in loaded:
        optimizer.load_state_dict(state)
    kept = [state_of(source), state_of(loaded[1])]
    train(problems[0], loaded[0], range(2, 5))
    assert_same_state(state_of(source), kept[0])
    assert_same_state(state_of(loaded[1]), kept[1])


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "pre-hook"])
def test_counts_of_bf16_parameters_are_not_rounded(backend, device, hooked):
    """torch casts loaded state to the parameter's dtype, in which 257 is 256."""
    params = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=device))]
    optimizer = FastSAM(params, lr=1e-3, momentum=0.9, dampening=0.5, backend=backend)
    params[0].grad = torch.ones_like(params[0])
    optimizer.first_step(zero_grad=False)
    optimizer.second_step()
    (name,) = [name for name in optimizer.state[params[0]] if name.startswith("fastsam_")]
    state = copy.deepcopy(optimizer.state_dict())
    value = state["state"][0][name]
    assert value.dtype == torch.float32
    assert float(value) == 1.0
    state["state"][0][name] = torch.full_like(value, 257.0)
    if hooked:
        inner = state
        state = {"state": {}, "param_groups": inner["param_groups"]}
        optimizer.register_load_state_dict_pre_hook(lambda o, s: inner)
    found = []
    optimizer.register_load_state_dict_post_hook(lambda o: found.append(o.state[params[0]][name].clone()))
    optimizer.load_state_dict(state)
    loaded = optimizer.state[params[0]][name]
    assert loaded.dtype == torch.float32
    assert float(loaded) == 257.0
    assert_same_bits(found[0], torch.tensor(257.0, device=device), "what a hook on loading sees")
    optimizer.first_step(zero_grad=False)
    optimizer.second_step()
    assert float(optimizer.state[params[0]][name]) == 258.0


def test_hooks_on_saving_and_loading(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    train(problem, optimizer, range(2))
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("save-pre", o)))
    optimizer.register_state_dict_post_hook(lambda o, s: calls.append(("save-post", o)) or {**s, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append(("load-pre", o)))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(("load-post", o)))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert calls == [(name, optimizer) for name in ("save-pre", "save-post", "load-pre", "load-post")]


def test_hook_on_loading_may_adapt_another_models_state(backend, device):
    """As torch's documentation shows it: the dict that is passed in has more parameters than the optimizer."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    train(problem, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    expected = state_of(optimizer)
    state["state"][4] = {"momentum_buffer": torch.zeros(9)}
    state["param_groups"].append({**state["param_groups"][0], "params": [4]})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, s: {
            "state": {k: v for k, v in s["state"].items() if k < 4},
            "param_groups": s["param_groups"][:1],
        }
    )
    optimizer.load_state_dict(state)
    assert_one_with_its_base(optimizer)
    assert_same_state(state_of(optimizer), expected)


def test_named_parameters(backend, device):
    problem = Problem(device)
    optimizer = FastSAM(problem.model.named_parameters(), lr=0.1, momentum=0.9, backend=backend)
    names = [name for name, _ in problem.model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    train(problem, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    assert state["param_groups"][0]["param_names"] == names
    other = Problem(device)
    unnamed = other.optimizer(backend)
    unnamed.load_state_dict(state)
    assert unnamed.param_groups[0]["param_names"] == names
    extra = nn.Parameter(torch.zeros(2, device=device))
    with pytest.raises(ValueError, match="names"):
        optimizer.add_param_group({"params": [extra]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("extra", extra)]})
    assert optimizer.param_groups[1]["param_names"] == ["extra"]
    assert optimizer.param_groups[1]["params"][0] is extra
