"""state_dict and loading: torch.optim's names and shapes, and what is refused."""

import copy
import io
import pickle

import pytest
import torch
from checks import assert_same_bits
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
from registry import every_base, every_fused_base, every_variant
from resumed import alone, assert_go_on_alike, fused, train
from torch import nn

from fastsam import FastSAM, checkpoint

pytestmark = pytest.mark.face


# ---- state_dict ----


@pytest.mark.parametrize("option", [None, "capturable", "fused"])
def test_step_counts_leave_the_device_together(monkeypatch, option):
    """Unless a base loads them that keeps them there: torch's others would wait for each in every step."""
    problem = Problem("cpu")
    options = {} if option is None else {option: True}
    optimizer = problem.optimizer("reference", "adamw", **options)
    problem.step(optimizer)
    waits, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(checkpoint, "_is_on_device", lambda value: isinstance(value, torch.Tensor))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (waits.append(tensor), cpu(tensor))[1])
    saved = optimizer.state_dict()["state"]
    assert len(waits) == (option is None)
    assert all(entries["step"] == 1 for entries in saved.values())
    problem.step(optimizer)
    assert all(entries["step"] == 1 for entries in saved.values()), "they are copies"


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
