"""replay_rng: the same random numbers, dropout masks above all, in both passes."""

import types

import pytest
import torch
from checks import assert_same_bits
from internals import GeneratorStates
from problem import Problem
from torch import nn

pytestmark = pytest.mark.face


class Dropped(Problem):
    """A problem with dropout, which notes every mask."""

    def __init__(self, device):
        super().__init__(device)
        self.model.append(nn.Dropout(0.5))
        self.masks = []
        self.model[3].register_forward_hook(lambda module, args, out: self.masks.append(out.detach() == 0))


def generator_state(device):
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
def test_both_passes_drop_same(backend, device, base):
    problem = Dropped(device)
    optimizer = problem.optimizer(backend, base, replay_rng=True)
    for _ in range(3):
        problem.step(optimizer)
    first, again, second, again_second, third, again_third = problem.masks
    assert_same_bits([again, again_second, again_third], [first, second, third])
    assert 0 < first.sum() < first.numel()
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_masks_differ_without_replay(backend, device):
    problem = Dropped(device)
    problem.step(problem.optimizer(backend))
    assert not torch.equal(*problem.masks)


def test_afterwards_generator_is_where_first_pass_left_it(backend, device):
    problem = Dropped(device)
    optimizer = problem.optimizer(backend, replay_rng=True)
    torch.manual_seed(7)
    problem.backward()
    expected = generator_state(device)
    torch.manual_seed(7)
    problem.step(optimizer)
    assert torch.equal(generator_state(device), expected)


def test_cpus_numbers_are_replayed_on_every_device(backend, device):
    """A closure may augment its batch on the CPU whatever the model is on."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend, replay_rng=True)
    draws = []
    optimizer.step(lambda: draws.append(torch.rand(3)) or problem.backward())
    assert_same_bits(draws[1], draws[0])


def test_ascent_closure_that_draws_more_or_less(backend, device):
    """The second pass begins where the first began; what follows goes on from where the first ended."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend, replay_rng=True)
    torch.manual_seed(3)
    expected = torch.rand(7)
    draws = []

    def drawing(count):
        return lambda: draws.append(torch.rand(count)) or problem.backward()

    for ascent, descent in ((2, 5), (5, 2)):
        torch.manual_seed(3)
        draws.clear()
        optimizer.zero_grad()
        optimizer.step(drawing(descent), ascent_closure=drawing(ascent))
        assert_same_bits(draws, [expected[:ascent], expected[:descent]])
        assert_same_bits(torch.rand(2), expected[ascent : ascent + 2])


def test_second_pass_that_raises_leaves_generator_as_after_first(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, replay_rng=True)
    states = []

    def closure():
        torch.rand(5)
        states.append(torch.get_rng_state())
        problem.backward()
        if len(states) == 2:
            torch.rand(5)
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), states[0])


def test_first_pass_that_makes_no_gradient_draws_as_usual(backend, device):
    optimizer = Problem(device).optimizer(backend, replay_rng=True)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    optimizer.step(lambda: torch.rand(2))
    assert_same_bits(torch.rand(2), expected[2:])


def test_two_phase_use_draws_as_usual(backend, device):
    problem = Dropped(device)
    problem.two_phase(problem.optimizer(backend, replay_rng=True))
    assert not torch.equal(*problem.masks)


def test_refused_step_draws_nothing(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, replay_rng=True)
    problem.first_step(optimizer)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="closures stands for closure"):
        optimizer.step(lambda: torch.rand(2), closures=[lambda: torch.rand(2)])
    assert torch.equal(torch.get_rng_state(), before)


class Accelerator(types.SimpleNamespace):
    """What torch.cuda shows of its generators, without a device."""

    def __init__(self, capturing=False):
        super().__init__(states={}, capturing=capturing)

    def is_current_stream_capturing(self):
        return self.capturing

    def get_rng_state(self, device):
        return self.states[device]

    def set_rng_state(self, state, device):
        self.states[device] = state


def test_every_device_of_parameters_is_replayed(monkeypatch):
    module = Accelerator()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    one, two = torch.device("cuda", 0), torch.device("cuda", 1)
    module.states = {one: "one before", two: "two before"}
    states = GeneratorStates([torch.device("cpu"), one, two, one])
    module.states = {one: "one after", two: "two after"}
    seen = []
    assert states.replayed(lambda: seen.append(dict(module.states)) or "loss")() == "loss"
    assert seen == [{one: "one before", two: "two before"}]
    assert module.states == {one: "one after", two: "two after"}


def test_under_graph_capture_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: Accelerator(capturing=True))
    with pytest.raises(RuntimeError, match="replay_rng=True cannot be used under CUDA graph capture"):
        GeneratorStates([torch.device("cuda", 0)])
