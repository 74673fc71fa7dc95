"""``adaptive_policy.py``: a captured step's operations, replayed, go on where the steps before have ended."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsam.adaptive_policy import Statistics
from fastsam.runtime import streams
from fastsam.schedules import AESAM

NORMS = [3.0, 1.0, 2.0, 5.0, 0.5, 4.0, 4.0, 0.1, 7.0, 1.0]


class Graph(TorchDispatchMode):
    """Records operations on tensors, and runs them again into the same memory, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self._calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, before in self._calls:
            for old, new in zip(tree_leaves(before), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


@pytest.fixture
def capturing(monkeypatch):
    on = []
    monkeypatch.setattr(streams, "is_capturing", lambda device: bool(on))
    return on


def decisions_of(statistics, norms, first_step=0):
    """What belongs to each of these steps, and the numbers at their end."""
    found = []
    for step, norm in enumerate(norms, first_step):
        found.append(statistics.ascends_before_first_pass())
        statistics.observe(torch.tensor(norm, dtype=torch.float64), step)
        statistics.commit()
    return found, statistics.numbers()


def test_replays_decide_as_the_steps_would_have(capturing):
    config = AESAM(len(NORMS))
    expected, numbers = decisions_of(Statistics(config), NORMS)
    assert 2 < sum(expected) < len(NORMS) - 2

    statistics, norm = Statistics(config), torch.zeros((), dtype=torch.float64)
    eager, _ = decisions_of(statistics, NORMS[:2])
    graphs = {}
    for kind in (True, False):  # the decision that is read here is not the kind: both graphs update alike
        statistics.ascends_before_first_pass()
        capturing.append(True)
        state = statistics._state.clone(), statistics._decision._value.clone()
        with Graph() as graphs[kind]:
            statistics.observe(norm, step=99)
            statistics.commit()
        for now, before in zip((statistics._state, statistics._decision._value), state, strict=True):
            now.copy_(before)  # what is captured has not happened
        capturing.clear()
    replayed = []
    for value in NORMS[2:]:
        replayed.append(statistics.ascends_before_first_pass())
        norm.fill_(value)
        graphs[replayed[-1]].replay()
    assert [*eager, *replayed] == expected
    assert statistics.numbers() == numbers


def test_checkpoint_after_replays_knows_the_step():
    config = AESAM(len(NORMS), lambda1=-3.0, lambda2=3.0)
    expected, _ = decisions_of(Statistics(config), NORMS)
    statistics = Statistics(config)
    first, numbers = decisions_of(statistics, NORMS[:6])
    other = Statistics(config)
    other.load(numbers)
    rest, _ = decisions_of(other, NORMS[6:], first_step=0)  # the optimizer's number stayed behind
    assert [*first, *rest] == expected
    older = Statistics(config)
    older.load(numbers[:3])  # of a version that had no number of its own
    assert [*first, *decisions_of(older, NORMS[6:], first_step=6)[0]] == expected


def test_steps_given_up_leave_the_decision():
    statistics = Statistics(AESAM(4))
    decisions_of(statistics, NORMS[:3])
    before = statistics.ascends_before_first_pass(), statistics.numbers()
    for norm in (1e-3, 1e3):  # one that would not ascend, one that would
        statistics.observe(torch.tensor(norm, dtype=torch.float64), 3)
        statistics.discard()
        assert (statistics.ascends_before_first_pass(), statistics.numbers()) == before


def test_what_cannot_be_captured_says_what_to_do(capturing):
    statistics = Statistics(AESAM(4))
    at_once = Statistics(AESAM(4, delay=0))
    for some in (statistics, at_once):
        decisions_of(some, NORMS[:2])
    capturing.append(True)
    with pytest.raises(RuntimeError, match=r"read optimizer\.ascends_next before the capture"):
        statistics.ascends_before_first_pass()
    at_once.observe(torch.tensor(1.0, dtype=torch.float64), 2)
    with pytest.raises(RuntimeError, match="use delay=1"):
        at_once.ascends_after_first_pass()
    with pytest.raises(RuntimeError, match="run a step outside the capture first"):
        Statistics(AESAM(4)).observe(torch.tensor(1.0, dtype=torch.float64), 0)
