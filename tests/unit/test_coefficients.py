"""``coefficients.py``: how many operators a method costs around its own formula and the kernels."""

from collections import Counter
from contextlib import contextmanager

import internals
import torch
from registry import METHODS, every_method
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import FastSAM

VIEWS = {"unbind", "expand", "select", "slice", "unsqueeze", "detach", "alias", "view", "reshape"}
FORMULAS = ("map_terms", "weigh", "ascent_terms", "descent_terms")


class _Operators(TorchDispatchMode):
    """Counts the operators that would be launches on a GPU, where it is told to."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.is_on = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.is_on and name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def switched(self, on):
        before, self.is_on = self.is_on, on
        yield
        self.is_on = before

    def watch(self, monkeypatch, owner, name, on):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            with self.switched(on):
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)


@every_method
def test_six_operators_a_phase_around_the_formula(monkeypatch, name):
    method = METHODS[name].method
    params = [torch.nn.Parameter(torch.full((size,), 2.0)) for size in (3, 5)]
    optimizer = FastSAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, method=method, backend="reference")
    operators = _Operators()
    for phase in internals.coefficient_phases:
        operators.watch(monkeypatch, *phase, on=True)
    for formula in FORMULAS:
        operators.watch(monkeypatch, type(method), formula, on=False)
    operators.watch(monkeypatch, internals.reference, "dots", on=False)

    def closure():
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, 1.0 + i)

    for _ in range(6):
        optimizer.step(closure)
    for _ in range(6):  # steps of every kind
        operators.counts.clear()
        with operators:
            optimizer.step(closure)
        phases = method.ascents + 1
        assert operators.counts.total() <= 6 * phases, operators.counts
