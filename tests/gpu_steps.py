"""Training steps whose demands on a GPU are counted: launches, uploads, waits, small operations of PyTorch's."""

import collections
from contextlib import contextmanager

import pytest
import registry
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import FastSAM, coefficients, engine, groups, methods, noise
from fastsam.backends import device_table
from fastsam.runtime import streams

METHODS = {name: case.method for name, case in registry.METHODS.items()}
METHODS |= {"random": methods.RandomSAM(), "direction": methods.Direction(lambda params, grads: [2 * g for g in grads])}
BASES = {"SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "AdamW": (torch.optim.AdamW, {"lr": 0.1})}

PRECISIONS = {
    "float32": {},
    "stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "masters": {"dtype": torch.bfloat16, "master_weights": True},
}

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
every_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
every_part = pytest.mark.parametrize("left", ["group that is not perturbed", "frozen tensor", "one without a gradient"])


class Steps:
    """A small model's training steps."""

    def __init__(self, backend, base=BASES["SGD"], dtype=torch.float32, **arguments):
        kind, options = base
        self.params = [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size in (3, 2000, 5)]
        self.optimizer = FastSAM(self.params, kind, backend=backend, **{**options, **arguments})
        self.alive = []

    def closure(self, fresh=False):
        for param in self.params:
            if param.grad is None or fresh:
                self.alive.append(param.grad)
                param.grad = torch.ones_like(param)
        return torch.zeros(())

    def leave_out(self, left):
        """Steps of a part of the parameters: ``left`` (of :data:`every_part`) is not in the ascent, or has no part."""
        if left == "group that is not perturbed":
            self.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(4))], "perturb": False})
            self.params.append(self.optimizer.param_groups[1]["params"][0])
        elif left == "frozen tensor":
            self.params.pop().requires_grad_(False)
        else:
            self.params.pop(0)

    def __call__(self, closures=0):
        if closures:
            self.optimizer.step(closures=[self.closure] * closures)
        else:
            self.optimizer.step(self.closure)


# ---- what a step asks of PyTorch ----

# What waits for an accelerator: on one, an index that is a list, and a tensor of the host's numbers, would be copied.
SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::lift_fresh"}
NO_LAUNCHES = {"unbind", "expand", "select", "slice", "unsqueeze", "detach", "alias", "view", "reshape", "as_strided"}
NO_LAUNCHES |= {"split", "split_with_sizes", "empty", "empty_like", "new_empty"}
# A launch of its own only for the CPU's sake: the number that torch.where is given.
NO_LAUNCHES |= {"scalar_tensor"}
FORMULAS = ("map_terms", "weigh", "ascent_terms", "descent_terms")


def hide_the_host(monkeypatch):
    """Where the CPU stands for a GPU: what is done with addresses and options on the host is not counted.

    Of all that a table reads there, only its uploads are a GPU's business, and they are counted elsewhere.
    """
    read = device_table.DeviceTable.read

    def unobserved(*args):
        with torch._C._DisableTorchDispatch():
            return read(*args)

    monkeypatch.setattr(device_table.DeviceTable, "read", unobserved)


def allow_uploads_of_graphs_alone(monkeypatch):
    """While a graph is captured, nothing is copied to the device but by the one function that knows of graphs."""

    def watch(owner, name):
        function = getattr(owner, name)

        def watched(*args):
            assert not streams.is_capturing(torch.device("cpu")), name
            return function(*args)

        monkeypatch.setattr(owner, name, watched)

    watch(device_table.Uploads, "write")
    for module in (streams, noise):
        watch(module, "send")


class CountingSyncs(TorchDispatchMode):
    """Counts operators that wait for an accelerator, into ``counter``."""

    def __init__(self, counter):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in SYNCS:
            self.counter[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


class SmallOperations(TorchDispatchMode):
    """Counts PyTorch's operators that would be launches on a GPU, by phase.

    Attributes:
        around: of each phase, the engine's, but for the kernels and what belongs to the method's formula.
        formula: of each phase, the method's own.
    """

    def __init__(self, monkeypatch, method):
        super().__init__()
        self.around, self.formula = [], []
        self._counters = [None]
        for name in (*FORMULAS, "direction") if method.has_direction else FORMULAS:
            self._count_in(monkeypatch, type(method), name, lambda: self.formula[-1])
        self._count_in(monkeypatch, engine, "draw_noise", lambda: self.formula[-1])
        for phase in ("ascend", "descend"):
            self._count_in(monkeypatch, engine.Engine, phase, self._begin_phase)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        counter = self._counters[-1]
        if counter is not None and function.namespace == "aten" and name not in NO_LAUNCHES:
            counter[name] += 1
        return function(*args, **(kwargs or {}))

    def _begin_phase(self):
        self.around.append(collections.Counter())
        self.formula.append(collections.Counter())
        return self.around[-1]

    def _count_in(self, monkeypatch, owner, name, counter):
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            with self._counting(counter()):
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    @contextmanager
    def _counting(self, counter):
        self._counters.append(counter)
        try:
            yield
        finally:
            self._counters.pop()


def assert_at_most_six_around_the_formula(monkeypatch, steps, method):
    """In each phase of steps of every kind; of the formula itself at most a few, except for random numbers."""
    for _ in range(6):
        steps()
    operations = SmallOperations(monkeypatch, method)
    with operations:
        for _ in range(6):
            steps()
    assert len(operations.around) >= 6
    for around in operations.around:
        assert around.total() <= 6, around


def read_tensors_on_the_device(monkeypatch):
    """Tensors on the CPU stand for an accelerator's: reading one would wait."""
    monkeypatch.setattr(coefficients, "_is_elsewhere", lambda value: isinstance(value, torch.Tensor))
    check = groups._check_rho
    monkeypatch.setattr(groups, "_check_rho", lambda rho, read=False: check(rho, read=False))
