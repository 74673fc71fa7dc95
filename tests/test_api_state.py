"""state_dict and loading, copies, added groups, hooks, schedulers: FastSAM as a torch.optim.Optimizer among others."""

import collections
import copy
import io
import pickle
import warnings

import pytest
import torch
import triton_interpreter
from checks import assert_same_bits, assert_within, values
from problem import BASES, Problem, Snapshot, assert_same_items, assert_same_state, groups_of, state_of
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastsam import FastSAM
from fastsam.precision import PRECISION_OPTIONS

base_names = pytest.mark.parametrize("base", BASES)

# The fused bases, with each kind of state that they keep.
FUSED = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "adam-amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}
fused_variants = pytest.mark.parametrize("variant", FUSED)


def fused(problem, backend, variant, **options):
    cls, base_options = FUSED[variant]
    return FastSAM(problem.model.parameters(), cls, backend=backend, **{"rho": 0.0, **base_options, **options})


def alone(problem, variant):
    cls, base_options = FUSED[variant]
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


def assert_one_with_its_base(optimizer):
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state


# ---- state_dict ----


@fused_variants
def test_the_state_dict_is_the_bases(backend, device, variant):
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


@fused_variants
def test_no_copy_of_the_weights_is_in_it(backend, device, variant):
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


@fused_variants
@pytest.mark.parametrize("through_file", [False, True], ids=["dict", "file"])
def test_the_base_loads_it_and_goes_on(backend, device, variant, through_file):
    mine, theirs = Problem(device), Problem(device)
    optimizer, base = fused(mine, backend, variant), alone(theirs, variant)
    train(mine, optimizer, range(3))
    base.load_state_dict(saved_and_loaded(optimizer) if through_file else copy.deepcopy(optimizer.state_dict()))
    assert_go_on_alike(backend, mine, optimizer, theirs, base)


@fused_variants
@pytest.mark.parametrize("mid_run", [False, True], ids=["fresh", "mid-run"])
def test_it_loads_the_bases_and_goes_on(backend, device, variant, mid_run):
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


@fused_variants
def test_there_and_back_again(backend, device, variant):
    """FastSAM, the base, FastSAM: as if the base had run from the start."""
    mine, theirs = Problem(device), Problem(device)
    first, base = fused(mine, backend, variant), alone(mine, variant)
    train(mine, first, range(2))
    base.load_state_dict(copy.deepcopy(first.state_dict()))
    train(mine, base, range(2, 4))
    last, throughout = fused(mine, backend, variant), alone(theirs, variant)
    last.load_state_dict(copy.deepcopy(base.state_dict()))
    train(mine, last, range(4, 6))
    train(theirs, throughout, range(6))
    torch.testing.assert_close(mine.weights(), theirs.weights(), rtol=1e-5, atol=1e-6)


def saved_and_loaded(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@base_names
def test_a_checkpoint_resumes_bit_for_bit(backend, device, base):
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


def test_options_of_the_climb_are_loaded_with_the_state(backend, device):
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


def test_each_group_keeps_its_own_where_the_loaded_one_has_none(backend, device):
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
        state["state"][2]["momentum_buffer"] = torch.zeros(2, 2)

    def fewer_groups(state):
        state["param_groups"] = []

    def other_sizes(state):
        state["param_groups"][0]["params"] = [0, 1, 2]

    def no_groups(state):
        del state["param_groups"]

    def no_state(state):
        del state["state"]

    shapes = r"parameter 2 \(shape \(3, 6\)\).*'momentum_buffer'.*\(2, 2\)"
    return {
        "shape": (shape, RuntimeError, shapes),
        "groups": (fewer_groups, ValueError, "different number of parameter groups"),
        "sizes": (other_sizes, ValueError, "doesn't match the size"),
        "no-groups": (no_groups, KeyError, "param_groups"),
        "no-state": (no_state, KeyError, "state"),
    }


@pytest.mark.parametrize(("spoil", "error", "message"), spoiled_states().values(), ids=spoiled_states())
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "mid-run"])
def test_a_state_that_does_not_fit_changes_nothing(backend, device, spoil, error, message, warm):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    other = Problem(device).optimizer(backend)
    train(problem, optimizer, range(2 * warm))
    train(Problem(device), other, [])
    donor = Problem(device)
    donated = donor.optimizer(backend, lr=0.7, rho=0.7)
    train(donor, donated, range(2))
    state = copy.deepcopy(donated.state_dict())
    spoil(state)
    before, given = Snapshot(optimizer), copy.deepcopy(state)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    before.assert_unchanged()
    assert list(state) == list(given)
    train(problem, optimizer, [5])


def test_adams_moments_of_another_shape(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, "adamw")
    train(problem, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["exp_avg_sq"] = torch.zeros(7)
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 1 \(shape \(6,\)\).*'exp_avg_sq'.*\(7,\)"):
        optimizer.load_state_dict(state)
    before.assert_unchanged()


def test_the_state_of_another_base_changes_nothing(backend, device):
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


def test_a_state_that_is_assigned_in_another_shape_is_refused_by_the_step(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    train(problem, optimizer, range(2))
    optimizer.state[problem.params[0]]["momentum_buffer"] = torch.zeros(2, 2, device=device)
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \(6, 4\)\): its state 'momentum_buffer' has shape"):
        problem.step(optimizer)
    before.assert_unchanged(grads=False)


WHILE_CLIMBED = {
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict({"state": {}, "param_groups": []}),
    "add_param_group": lambda o: o.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "save": lambda o: torch.save(o, io.BytesIO()),
}


@base_names
@pytest.mark.parametrize("act", WHILE_CLIMBED.values(), ids=WHILE_CLIMBED)
def test_nothing_is_saved_copied_or_added_while_climbed(backend, device, base, act):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    problem.first_step(optimizer)
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"while the weights are climbed; call second_step\(\) or restore\(\) first"):
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


@pytest.mark.parametrize("variant", [name for name in FUSED if name != "sgd"])  # which keeps no state
@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS)
def test_a_state_that_was_reset_starts_anew(backend, device, variant, reset):
    """Counts of steps too: torch.optim has no other memory than its state."""
    mine, theirs = Problem(device), Problem(device)
    optimizer, base = fused(mine, backend, variant), alone(theirs, variant)
    train(mine, optimizer, range(3))
    train(theirs, base, range(3))
    reset(optimizer)
    reset(base)
    assert_one_with_its_base(optimizer)
    assert_go_on_alike(backend, mine, optimizer, theirs, base)


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


def test_a_loaded_lr_is_the_one_that_counts(backend, device):
    """The oldest fault of wrappers: groups of their own, whose lr nobody reads."""
    problem = Problem(device)
    optimizer = FastSAM(problem.params, lr=0.1, rho=0.0, backend=backend)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.param_groups[0]["lr"] = 0.0
    start = problem.weights()
    problem.step(optimizer)
    assert_same_bits(problem.weights(), start)


def test_two_optimizers_that_load_one_state_are_two(backend, device):
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


def test_a_hook_on_loading_may_adapt_another_models_state(backend, device):
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


# ---- copies ----

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    "save": lambda both: _through_file(both),
}


def _through_file(both):
    file = io.BytesIO()
    torch.save(both, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@base_names
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
def test_copies_train_alike_and_apart(backend, device, base, copied, steps):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base, rho=0.1, adaptive=True, replay_rng=True)
    for _ in range(steps):
        problem.step(optimizer)
    twin = Problem(device)
    twin.model, other = copied((problem.model, optimizer))
    assert type(other) is FastSAM
    assert type(other.base_optimizer) is type(optimizer.base_optimizer)
    assert other.backend == backend
    assert other.defaults == optimizer.defaults
    assert not other.perturbed
    assert_one_with_its_base(other)
    assert all(p is q for p, q in zip(other.param_groups[0]["params"], twin.params, strict=True))
    untouched = Snapshot(optimizer)
    for _ in range(2):
        twin.step(other)
    untouched.assert_unchanged()
    for _ in range(2):
        problem.step(optimizer)
    assert_same_bits(twin.weights(), problem.weights())
    assert_same_state(state_of(other), state_of(optimizer))
    draws = []
    other.step(lambda: draws.append(torch.rand(2)) or twin.backward())
    assert_same_bits(draws[1], draws[0], "replay_rng")


def test_a_copy_can_be_saved_loaded_and_added_to(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.step(optimizer)
    _, other = copy.deepcopy((problem.model, optimizer))
    other.load_state_dict(other.state_dict())
    assert_one_with_its_base(other)
    other.add_param_group({"params": [nn.Parameter(torch.zeros(2, device=device))]})
    assert other.param_groups[1]["rho"] == 0.05
    assert_one_with_its_base(other)
    assert len(optimizer.param_groups) == 1
    assert repr(other).startswith("FastSAM over SGD (")


# ---- groups ----


@base_names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["same-dtype", "other-dtype"])
def test_a_group_may_be_added_in_mid_run(backend, device, base, dtype):
    """It trains from then on as a group that had been there, without gradients, from the start."""
    problems = [Problem(device), Problem(device)]
    extras = [nn.Parameter(values((5,), dtype, device)) for _ in problems]
    cls, options = BASES[base]
    from_the_start = FastSAM(
        [{"params": problems[0].params}, {"params": [extras[0]], "rho": 0.3, "lr": 0.02}],
        cls,
        backend=backend,
        **options,
    )
    later = FastSAM(problems[1].params, cls, backend=backend, **options)

    def closure(problem, optimizer, extra, used):
        def run():
            optimizer.zero_grad()
            loss = problem.loss() + (extra.square().sum() if used else 0.0)
            loss.backward()
            return loss

        return run

    for step in range(5):
        if step == 2:
            given = {"params": extras[1], "rho": 0.3, "lr": 0.02}
            later.add_param_group(given)
            assert given == {"params": extras[1], "rho": 0.3, "lr": 0.02}
        for problem, optimizer, extra in zip(problems, (from_the_start, later), extras, strict=True):
            optimizer.step(closure(problem, optimizer, extra, step >= 2))
    assert_same_bits(problems[1].weights(), problems[0].weights())
    assert_same_bits(extras[1].detach(), extras[0].detach())
    assert_same_state(state_of(later), state_of(from_the_start))


def test_an_added_group_takes_the_constructors_options(backend, device):
    problem = Problem(device)
    optimizer = FastSAM(problem.params, rho=0.3, adaptive=True, lr=0.2, momentum=0.8, backend=backend)
    optimizer.param_groups[0]["rho"] = 0.9
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1, device=device))]})
    assert set(optimizer.param_groups[1]) == set(optimizer.param_groups[0])
    added = optimizer.param_groups[1]
    assert [added[name] for name in ("rho", "adaptive", "perturb", "lr", "momentum")] == [0.3, True, True, 0.2, 0.8]
    assert_one_with_its_base(optimizer)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho must be"),
        ({"perturb": "no"}, TypeError, "perturb must be True or False"),
        ({"params": "again"}, ValueError, "parameter 4 .* is parameter 0 again"),
        ([nn.Parameter(torch.zeros(1))], TypeError, "a parameter group must be a dict"),
        ({"lr": 0.1, "params": None}, TypeError, "params must be"),
    ],
    ids=["rho", "perturb", "duplicate", "list", "params"],
)
def test_a_bad_group_changes_nothing(backend, device, group, error, message):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.step(optimizer)
    if isinstance(group, dict):
        group = {"params": [nn.Parameter(torch.zeros(1, device=device))], **group}
        if group["params"] == "again":
            group["params"] = [problem.params[0]]
    before = Snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    before.assert_unchanged()
    problem.step(optimizer)


def test_parameters_that_leave_a_group_are_let_alone(backend, device):
    """Groups are lists that programs edit."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.step(optimizer)
    left = optimizer.param_groups[0]["params"].pop()
    kept = left.detach().clone()
    problem.step(optimizer)
    assert_same_bits(left.detach(), kept)


def test_repr(backend):
    optimizer = FastSAM([nn.Parameter(torch.zeros(1))], torch.optim.AdamW, rho=0.125, lr=0.5, backend=backend)
    text = repr(optimizer)
    assert text.startswith("FastSAM over AdamW (\nParameter Group 0\n")
    for line in ("    rho: 0.125\n", "    adaptive: False\n", "    lr: 0.5\n", "    betas: (0.9, 0.999)\n"):
        assert line in text


def test_zero_grad_is_torchs(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in problem.params)
    optimizer.zero_grad()
    assert [p.grad for p in problem.params] == [None] * 4


# ---- step hooks ----


@pytest.fixture
def hook_calls():
    """The calls of hooks that are registered for every optimizer."""
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: calls.append(("global-pre", o))),
        register_optimizer_step_post_hook(lambda o, a, k: calls.append(("global-post", o))),
    ]
    yield calls
    for handle in handles:
        handle.remove()


@base_names
@pytest.mark.parametrize("use", ["closure", "two-phase", "step", "no-gradient"])
def test_hooks_run_once_per_step(backend, device, hook_calls, base, use):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    optimizer.register_step_pre_hook(lambda o, a, k: hook_calls.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, a, k: hook_calls.append(("post", o)))
    for _ in range(2):
        hook_calls.clear()
        if use == "closure":
            problem.step(optimizer)
        elif use == "no-gradient":
            optimizer.zero_grad()
            optimizer.step(lambda: None)
        else:
            problem.first_step(optimizer)
            assert hook_calls == []
            problem.backward()
            optimizer.step() if use == "step" else optimizer.second_step()
        assert hook_calls == [(name, optimizer) for name in ("global-pre", "pre", "post", "global-post")]


def test_a_pre_hook_may_replace_the_closure(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    used = []
    optimizer.register_step_pre_hook(lambda o, a, k: ((o, lambda: used.append(1) or problem.backward()), {}))
    optimizer.step(lambda: pytest.fail("replaced"))
    assert used == [1, 1]


def test_what_hooks_see(backend, device):
    """Before: the weights as they were. After: weights updated, not climbed."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    seen = {}
    optimizer.register_step_pre_hook(lambda o, a, k: seen.update(before=problem.weights(), climbed=o.perturbed))
    optimizer.register_step_post_hook(lambda o, a, k: seen.update(after=problem.weights(), still=o.perturbed))
    start = problem.weights()
    problem.step(optimizer)
    assert_same_bits(seen["before"], start)
    assert_same_bits(seen["after"], problem.weights())
    assert (seen["climbed"], seen["still"]) == (False, False)


# ---- schedulers ----

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torchs_is_here():
    theirs = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert theirs - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize(
    ("variant", "use"),
    [("sgd-momentum", "closure"), ("sgd-momentum", "two-phase"), ("adamw", "closure"), ("rmsprop", "two-phase")],
    ids=["sgd-closure", "sgd-two-phase", "adamw-closure", "rmsprop-two-phase"],
)
@pytest.mark.filterwarnings("error")
def test_schedulers_as_on_the_base_alone(backend, device, make, variant, use):
    """No warning, the same rates, and updates that follow them (momentum and betas where those cycle)."""
    mine, theirs = Problem(device), Problem(device)
    cls, options = FUSED[variant] if variant in FUSED else BASES[variant]
    optimizer = FastSAM(mine.params, cls, rho=0.0, backend=backend, **options)
    base = cls(theirs.params, foreach=False, **options)
    schedulers = make(optimizer), make(base)
    with warnings.catch_warnings():
        # SequentialLR's own, about a call that it makes itself.
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")
        for _ in range(triton_interpreter.fewer(6, 2, backend, device)):
            mine.step(optimizer) if use == "closure" else mine.two_phase(optimizer)
            theirs.plain_step(base)
            for scheduler in schedulers:
                scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            (group,), (expected,) = optimizer.param_groups, base.param_groups
            for name in ("lr", "momentum", "betas"):
                assert group.get(name) == expected.get(name), name
    assert_one_with_its_base(optimizer)
    if backend == "reference" or variant == "rmsprop":
        assert_same_bits(mine.weights(), theirs.weights())
    else:
        torch.testing.assert_close(mine.weights(), theirs.weights(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_a_scheduler_and_its_optimizer_resume(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for _ in range(3):
        problem.step(optimizer)
        scheduler.step()
    resumed = Problem(device)
    resumed.model.load_state_dict(problem.model.state_dict())
    other = resumed.optimizer(backend)
    again = lr_scheduler.CosineAnnealingLR(other, 8)
    again.load_state_dict(scheduler.state_dict())
    other.load_state_dict(saved_and_loaded(optimizer))
    for _ in range(3):
        problem.step(optimizer)
        scheduler.step()
        resumed.step(other)
        again.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert_same_bits(resumed.weights(), problem.weights())


def test_a_scheduler_without_a_step_warns_as_ever(backend, device):
    """first_step() is no step: else the warning that guards others' loops would be lost."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    problem.first_step(optimizer)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        scheduler.step()
