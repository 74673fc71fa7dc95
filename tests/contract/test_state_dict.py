"""state_dict and loading: torch.optim's names and shapes, checkpoints in both directions, and what is refused."""

import collections
import copy
import io
import pickle

import pytest
import torch
from checks import assert_same_bits, assert_within, values
from internals import PRECISION_OPTIONS
from problem import (
    Problem,
    Snapshot,
    assert_one_with_its_base,
    assert_same_items,
    assert_same_state,
    groups_of,
    saved_and_loaded,
    state_of,
)
from registry import FUSED_VARIANTS, STATEFUL_VARIANTS, every_base, every_fused_base, every_variant
from torch import nn

from fastsam import FastSAM

pytestmark = pytest.mark.face


def fused(problem, backend, variant, **options):
    cls, base_options = FUSED_VARIANTS[variant]
    return FastSAM(problem.model.parameters(), cls, backend=backend, **{"rho": 0.0, **base_options, **options})


def alone(problem, variant):
    cls, base_options = FUSED_VARIANTS[variant]
    return cls(problem.model.parameters(), foreach=False, **base_options)


def give_grads(problem, seed):
    for i, p in enumerate(problem.params):
        p.grad = values(p.shape, p.dtype, p.device, seed=100 * seed + i)


def train(problem, optimizer, seeds):
    """Steps with gradients that do not depend on the weights."""
    for seed in seeds:
        give_grads(problem, seed)
        if isinstance(optimizer, FastSAM):
            optimizer.first_step()
            give_grads(problem, seed)
        optimizer.step()


def assert_go_on_alike(backend, mine, optimizer, theirs, other):
    """From the same weights and state on: the same bits on ``reference``, the design's tolerance elsewhere."""
    with torch.no_grad():
        for p, q in zip(mine.params, theirs.params, strict=True):
            q.copy_(p)
    for seed in (11, 12) if backend == "reference" else (11,):
        start = mine.weights()
        train(mine, optimizer, [seed])
        train(theirs, other, [seed])
        if backend == "reference":
            assert_same_bits(mine.weights(), theirs.weights())
        else:
            assert_within(mine.weights(), theirs.weights(), start)
    ours, reference = state_of(optimizer), state_of(other)
    assert sorted(ours) == sorted(reference)
    for i, entries in reference.items():
        assert {name for name in ours[i] if not name.startswith("fastsam_")} == {
            name for name in entries if not name.startswith("fastsam_")
        }


# ---- state_dict ----


@every_variant
def test_state_dict_is_bases(backend, device, variant):
    mine, theirs = Problem(device), Problem(device)
    optimizer, base = fused(mine, backend, variant, rho=0.05), alone(theirs, variant)
    train(mine, optimizer, range(3))
    train(theirs, base, range(3))
    ours, expected = optimizer.state_dict(), base.state_dict()
    assert list(ours) == ["state", "param_groups"]
    (group,), (expected_group,) = ours["param_groups"], expected["param_groups"]
    assert set(group) - set(expected_group) == {"rho", "adaptive", "perturb", *PRECISION_OPTIONS}
    assert set(expected_group) <= set(group)
    assert group["params"] == expected_group["params"] == [0, 1, 2, 3]
    assert list(ours["state"]) == list(expected["state"])
    for i, entries in expected["state"].items():
        own = {name: value for name, value in ours["state"][i].items() if not name.startswith("fastsam_")}
        assert {name: (v.shape, v.dtype) for name, v in own.items()} == {
            name: (v.shape, v.dtype) for name, v in entries.items()
        }
        if "step" in entries:
            assert own["step"] == entries["step"] == 3


@every_variant
def test_state_dict_has_no_copy_of_weights(backend, device, variant):
    problem = Problem(device)
    optimizer = fused(problem, backend, variant, rho=0.05)
    train(problem, optimizer, range(2))
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    size = sum(p.numel() * p.element_size() for p in problem.params)
    slots = len({name for entries in optimizer.state.values() for name, value in entries.items() if value.dim() > 0})
    # Views of shared memory are saved with all of it: that must hold states and nothing else.
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for entries in optimizer.state.values()
        for value in entries.values()
    }
    padding = 64 * 4 * (slots + 1)
    assert sum(storages.values()) <= slots * size + padding
    loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    kept = [v for entries in loaded["state"].values() for v in entries.values() if v.dim() > 0]
    assert not any(torch.equal(v, w) for v in kept for w in problem.weights() if v.shape == w.shape)


@every_variant
@pytest.mark.parametrize("through_file", [False, True], ids=["dict", "file"])
def test_base_loads_fastsam_state(backend, device, variant, through_file):
    mine, theirs = Problem(device), Problem(device)
    optimizer, base = fused(mine, backend, variant), alone(theirs, variant)
    train(mine, optimizer, range(3))
    base.load_state_dict(saved_and_loaded(optimizer) if through_file else copy.deepcopy(optimizer.state_dict()))
    assert_go_on_alike(backend, mine, optimizer, theirs, base)


@every_variant
@pytest.mark.parametrize("mid_run", [False, True], ids=["fresh", "mid-run"])
def test_fastsam_loads_base_state(backend, device, variant, mid_run):
    mine, theirs = Problem(device), Problem(device)
    optimizer, base = fused(mine, backend, variant, rho=0.0, adaptive=True), alone(theirs, variant)
    if mid_run:
        train(mine, optimizer, range(20, 25))
    train(theirs, base, range(3))
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    assert_one_with_its_base(optimizer)
    (group,) = optimizer.param_groups
    assert (group["rho"], group["adaptive"], group["perturb"]) == (0.0, True, True), "what the base's lacks is kept"
    assert_go_on_alike(backend, mine, optimizer, theirs, base)


@every_base
def test_checkpoint_resumes_bit_for_bit(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base, rho=torch.tensor(0.1), lr=torch.tensor(0.05))
    for _ in range(3):
        problem.step(optimizer)
    saved = saved_and_loaded(optimizer)
    resumed = Problem(device)
    resumed.model.load_state_dict(problem.model.state_dict())
    other = resumed.optimizer(backend, base)
    other.load_state_dict(saved)
    assert_one_with_its_base(other)
    assert_same_items(groups_of(other), groups_of(optimizer), "groups")
    for _ in range(3):
        problem.step(optimizer)
        resumed.step(other)
    assert_same_bits(resumed.weights(), problem.weights())
    assert_same_state(state_of(other), state_of(optimizer))


def test_options_of_perturbation_are_loaded_with_state(backend, device):
    one, two = Problem(device), Problem(device)
    groups = [{"params": two.params[:2]}, {"params": two.params[2:]}]
    optimizer = FastSAM(
        [{"params": one.params[:2], "perturb": False}, {"params": one.params[2:], "adaptive": True}], rho=0.3, lr=0.1
    )
    other = FastSAM(groups, rho=0.7, lr=0.2, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    assert [(g["rho"], g["adaptive"], g["perturb"], g["lr"]) for g in other.param_groups] == [
        (0.3, False, False, 0.1),
        (0.3, True, True, 0.1),
    ]


def test_each_group_keeps_its_own_where_loaded_one_has_none(backend, device):
    one, two = Problem(device), Problem(device)
    base = torch.optim.SGD([{"params": one.params[:2]}, {"params": one.params[2:], "lr": 0.5}], lr=0.1)
    optimizer = FastSAM(
        [{"params": two.params[:2], "rho": 0.7}, {"params": two.params[2:], "perturb": False}],
        rho=0.3,
        lr=0.2,
        backend=backend,
    )
    optimizer.load_state_dict(base.state_dict())
    assert [(g["rho"], g["perturb"], g["lr"]) for g in optimizer.param_groups] == [(0.7, True, 0.1), (0.3, False, 0.5)]
    two.step(optimizer)


# ---- refused ----


def spoiled_states():
    def shape(state):
        state["state"][2][("momentum_buffer" if "momentum_buffer" in state["state"][2] else "exp_avg_sq")] = (
            torch.zeros(2, 2)
        )

    def fewer_groups(state):
        state["param_groups"] = []

    def other_sizes(state):
        state["param_groups"][0]["params"] = [0, 1, 2]

    def no_groups(state):
        del state["param_groups"]

    def no_state(state):
        del state["state"]

    shapes = r"parameter 2 \(shape \(3, 6\)\).*'(momentum_buffer|exp_avg_sq)'.*\(2, 2\)"
    return {
        "shape": (shape, RuntimeError, shapes),
        "groups": (fewer_groups, ValueError, "different number of parameter groups"),
        "sizes": (other_sizes, ValueError, "doesn't match the size"),
        "no-groups": (no_groups, KeyError, "param_groups"),
        "no-state": (no_state, KeyError, "state"),
    }


@pytest.mark.parametrize(("spoil", "error", "message"), spoiled_states().values(), ids=spoiled_states())
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "mid-run"])
@every_fused_base
def test_state_that_does_not_fit_changes_nothing(backend, device, base, spoil, error, message, warm):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    train(problem, optimizer, range(2 * warm))
    donor = Problem(device)
    donated = donor.optimizer(backend, base, lr=0.7, rho=0.7)
    train(donor, donated, range(2))
    state = copy.deepcopy(donated.state_dict())
    spoil(state)
    before, given = Snapshot(optimizer), copy.deepcopy(state)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    before.assert_unchanged()
    assert list(state) == list(given)
    train(problem, optimizer, [5])


def test_state_of_another_base_changes_nothing(backend, device):
    """Adam looks for its counts while it loads."""
    donor = Problem(device)
    other = donor.optimizer(backend)
    train(donor, other, range(2))
    problem = Problem(device)
    optimizer = problem.optimizer(backend, "adamw")
    train(problem, optimizer, range(2))
    before = Snapshot(optimizer)
    with pytest.raises(KeyError, match="step"):
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    before.assert_unchanged()


def test_state_that_is_assigned_in_another_shape_is_refused_by_step(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    train(problem, optimizer, range(2))
    optimizer.state[problem.params[0]]["momentum_buffer"] = torch.zeros(2, 2, device=device)
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \(6, 4\)\): its state 'momentum_buffer' has shape"):
        problem.step(optimizer)
    before.assert_unchanged(grads=False)


WHILE_PERTURBED = {
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict({"state": {}, "param_groups": []}),
    "add_param_group": lambda o: o.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda o: torch.save(o, io.BytesIO()),
}


@every_base
@pytest.mark.parametrize("act", WHILE_PERTURBED.values(), ids=WHILE_PERTURBED)
def test_nothing_is_saved_copied_or_added_while_perturbed(backend, device, base, act):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    problem.first_step(optimizer)
    before = Snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"while the weights are perturbed; call second_step\(\) or restore\(\) first"
    ):
        act(optimizer)
    before.assert_unchanged()
    problem.backward()
    optimizer.second_step()


# ---- loading in full ----


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
    assert float(optimizer.state[mine.params[0]]["step"]) == (9.0 if backend == "reference" else 8.0)


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
