"""Runs lives of an optimizer (fuzz_lives.py). One file: every operation shares one optimizer and its twin.

A life's twin, plain and undisturbed, takes the same steps by ``step(closure)``: both must have the same weights after
every operation.
"""

import contextlib
import copy
import io
import pickle
import signal
import warnings

import pytest
import torch
from fuzz_lives import BASES, LASTING, PRECISIONS, UNSCALED, Life, Refusal, Resume, Step, Surgery
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from wrappers import CopyingWrapper, ForwardingWrapper

from fastsam import FastSAM, methods

WRAP = {"none": lambda optimizer: optimizer, "copies": CopyingWrapper, "forwards": ForwardingWrapper, "view": copy.copy}


class Subclass(torch.Tensor):
    """A gradient of another class, with memory of its own."""


class Planned(Exception):
    """What a failing closure and a signal's handler raise."""


def stop(*_):
    raise Planned


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# In which mode the optimizer is called, and what ends it in a closure.
MODES = {
    "none": (contextlib.nullcontext, contextlib.nullcontext),
    "default device": (lambda: torch.device("meta"), lambda: torch.device("cpu")),
    "default dtype": (lambda: default_dtype(torch.float64), lambda: default_dtype(torch.float32)),
    "inference": (torch.inference_mode, lambda: torch.inference_mode(False)),
}


@contextlib.contextmanager
def handling_signals():
    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def run(backend, life):
    mine, twin = Subject(backend, life), Subject(backend, life, is_plain=True)
    for operation in life.operations:
        mine.carry_out(operation)
        twin.follow(operation)
        mine.assert_like(twin)


class Subject:
    """Parameters and their optimizer, with a gradient that is a function of the weights."""

    def __init__(self, backend, life: Life, *, is_plain=False):
        self.backend, self.life = backend, life
        self.wrapper = "none" if is_plain else life.wrapper
        self.calling, self.in_closure = MODES["none" if is_plain else life.mode]
        self.base, options = BASES[life.base]
        self.dtype, precision = PRECISIONS[life.precision]
        self.options = {**options, **precision, "method": life.method, "backend": backend}
        self.params = [self.make_param(i) for i in range(3)]
        self.frozen, self.held, self.memory = [], [], {}
        self.optimizer = FastSAM(self.params, self.base, rho=0.2, **self.options)
        self.wrapped = WRAP[self.wrapper](self.optimizer)

    def make_param(self, i):
        numbers = torch.linspace(0.5 + i, 1.5, 3 + 5 * i, dtype=torch.float64).sin() + 0.5
        return nn.Parameter(numbers.to(self.dtype))

    # ---- operations ----

    def carry_out(self, operation):
        if isinstance(operation, Step):
            self.step(operation)
        elif isinstance(operation, Refusal):
            self.refuse(operation.what)
        elif isinstance(operation, Resume):
            self.resume(operation.how)
        else:
            self.operate(operation.what)
        assert not self.optimizer.perturbed

    def follow(self, operation):
        """The same without anything unusual."""
        if isinstance(operation, Step) and operation.way in LASTING:
            self.optimizer.step(self.closure("plain"))
        elif isinstance(operation, Step) and operation.way == "overflow":
            self.in_two_phases("overflow", "plain")  # counts as a step
        elif isinstance(operation, Surgery):
            self.operate(operation.what)

    # ---- gradients ----

    def closure(self, gradients, scale=1.0):
        def closure():
            with self.in_closure():
                if gradients.startswith("autograd"):
                    self.clear(in_place=gradients == "autograd, zeroed")
                    self.backward(scale)
                    return
                for i, param in enumerate(self.params):
                    self.give(i, param, (param.detach().double() ** 3 - 0.3 * param.detach()).mul(scale), gradients)

        return closure

    def backward(self, scale=1.0):
        with torch.enable_grad():
            loss = sum((p.double() ** 4 / 4 - 0.15 * p.double() ** 2).sum() for p in self.params)
            (loss * scale).backward()

    def clear(self, in_place):
        for param in self.params:
            param.grad = param.grad.zero_() if in_place and is_ordinary(param.grad) else None

    def give(self, i, param, grad, kind):
        grad = grad.to(param.dtype)
        if kind == "zeroed in place" and is_ordinary(param.grad):
            param.grad.zero_().add_(grad)
            return
        if kind == "numpy" and param.dtype != torch.bfloat16:
            memory = self.memory.setdefault((i, grad.shape), torch.empty_like(grad).numpy())
            memory[:] = grad.numpy()
            grad = torch.from_numpy(memory)
        elif kind == "flat":
            memory = self.memory.setdefault("flat", torch.zeros(1024, dtype=param.dtype))
            grad = memory[64 * i : 64 * i + grad.numel()].copy_(grad)
        elif kind == "held":
            self.held = [*self.held[-4:], grad]
        elif kind == "lazy clone":
            self.held, grad = [*self.held[-4:], grad], torch._lazy_clone(grad)
        elif kind == "subclass":
            grad = grad.as_subclass(Subclass)
        elif kind == "wrapper subclass":
            grad = AsyncCollectiveTensor(grad)
        elif kind == "with a graph":
            with torch.enable_grad():
                grad = grad.requires_grad_() * 1
        elif kind == "inference":
            with torch.inference_mode():
                grad = grad * 1
        param.grad = grad

    # ---- steps ----

    def step(self, operation):
        way, gradients = operation.way, operation.gradients
        weights, closure = self.weights(), self.closure(gradients)
        if way in ("closure", "micro-batches"):
            with self.calling():
                if way == "closure" or not self.may_average():
                    self.wrapped.step(closure)
                else:
                    self.optimizer.step(closures=[closure, closure])
        elif way == "signal":
            self.step_with_signal(closure)
        elif way in ("fails", "signal in a closure"):
            self.fail(closure, stop if way == "fails" else lambda: signal.raise_signal(signal.SIGALRM))
        elif way == "given up":
            self.first_phase(closure)
            self.optimizer.restore()
        else:
            self.in_two_phases(way, gradients)
        if way not in LASTING:
            self.assert_weights(weights)

    def may_average(self):
        """Micro-batches have perturbations of their own, and so roundings of their own."""
        method = self.life.method
        averages = not method.why_no_micro_batches
        return averages and not isinstance(method, methods.ESAM) and self.life.precision != "stochastic"

    def in_two_phases(self, way, gradients):
        is_scaled = way in ("scaled", "overflow") and self.dtype != torch.bfloat16
        scale = 1024.0 if is_scaled and not isinstance(self.life.method, UNSCALED) else 1.0
        closure = self.closure(gradients, scale)
        self.first_phase(closure)
        closure()
        if way in ("scaled", "overflow"):
            self.wrapped.grad_scale = torch.tensor(scale)
            self.wrapped.found_inf = torch.tensor(float(way == "overflow"))
        with self.calling():
            (self.wrapped.second_step if way == "two phases" else self.wrapped.step)()
        if way in ("scaled", "overflow"):
            del self.wrapped.grad_scale, self.wrapped.found_inf

    def first_phase(self, closure):
        """All of a step but its last backward pass and the update."""
        if self.life.method.needs_first_pass:
            closure()
        while self.call_first() and self.optimizer._engine.ascents < self.life.method.ascents:
            closure()

    def call_first(self):
        with self.calling():
            return self.wrapped.first_step()

    def step_with_signal(self, closure):
        """A handler that raises waits for the end of the update."""
        engine = self.optimizer._engine
        descend = engine.descend
        engine.descend = lambda *args: (signal.raise_signal(signal.SIGALRM), descend(*args))
        try:
            with handling_signals(), pytest.raises(Planned), self.calling():
                self.wrapped.step(closure)
        finally:
            del engine.descend

    def fail(self, closure, how):
        def failing():
            closure()
            if self.optimizer.perturbed or not self.optimizer._ascends_now():
                how()

        with handling_signals(), pytest.raises(Planned), self.calling():
            self.wrapped.step(failing)

    # ---- refusals ----

    def refuse(self, what):
        """Does what is refused, in a step that is then given up, or outside of any."""
        weights = self.weights()
        if what == "a step within perturb_by":
            ones = [torch.ones_like(param) if param.requires_grad else None for param in self.all_params()]
            with self.optimizer.perturb_by(ones), pytest.raises(RuntimeError, match="within perturb_by"):
                self.wrapped.step(self.closure("plain"))
        elif what == "accumulation before a closure":
            self.accumulate()
        else:
            self.first_phase(self.closure("plain"))
            moved = [p for p, before in zip(self.params, weights, strict=True) if not torch.equal(p.detach(), before)]
            if moved:
                self.call_refused(what, moved)
        self.optimizer.restore()
        self.assert_weights(weights)

    def all_params(self):
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def call_refused(self, what, moved):
        writers = {
            "another optimizer steps": torch.optim.SGD(moved, lr=0.1).step,
            "weights are loaded": lambda: nn.ParameterList(self.params).load_state_dict(self.weights_by_name()),
        }
        if what in writers:
            self.closure("plain")()
            writers[what]()
            with pytest.raises(RuntimeError, match="was written to while it was perturbed"):
                self.wrapped.second_step()
            return
        calls = {
            "another FastSAM": FastSAM(moved[-1:], lr=0.1, backend=self.backend).first_step,
            "state_dict": self.wrapped.state_dict,
            "add_param_group": lambda: self.wrapped.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
            "deepcopy": lambda: copy.deepcopy(self.optimizer),
        }
        self.closure("plain")()
        with pytest.raises(RuntimeError, match=r"not possible while the weights are perturbed|perturbed by it"):
            calls[what]()

    def weights_by_name(self):
        return nn.ParameterList(self.params).state_dict()

    def accumulate(self):
        """A backward pass before a step whose closure adds to it: warned of once. The step fails."""
        warns = (
            self.life.method.needs_first_pass
            and self.optimizer._ascends_now()
            and not self.optimizer._engine.accumulation._is_over
        )
        self.clear(in_place=False)
        self.backward()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            self.fail(self.add_up, stop)
        assert ["last micro-batch alone" in str(one.message) for one in found] == [True] * warns

    def add_up(self):
        with self.in_closure():
            self.backward()

    # ---- checkpoints ----

    def resume(self, how):
        if how in ("pickled", "deepcopy"):
            pair = self.params, self.frozen, self.optimizer
            pair = pickle.loads(pickle.dumps(pair)) if how == "pickled" else copy.deepcopy(pair)
            self.params, self.frozen, self.optimizer = pair
        elif how == "distributed checkpoint" and "lr" in self.optimizer.param_groups[0]:
            self.resume_distributed()
        else:
            saved = in_a_file(self.wrapped.state_dict())
            if how == "with another SAM's entries":
                for entries in saved["state"].values():
                    if isinstance(entries, dict):
                        entries["old_p"] = torch.zeros(2)
            elif how == "by way of another method" and self.life.method.state_name is None:
                other = self.make_again(method=methods.GSAM())
                other.load_state_dict(saved)
                saved = in_a_file(other.state_dict())
            self.optimizer = self.make_again()
            (self.optimizer.base_optimizer if how == "by the base" else self.optimizer).load_state_dict(saved)
        self.wrapped = WRAP[self.wrapper](self.optimizer)

    def make_again(self, **options):
        groups = [{"params": list(group["params"])} for group in self.optimizer.param_groups]
        return FastSAM(groups, self.base, rho=0.1, **{**self.options, **options})

    def resume_distributed(self):
        self.clear(in_place=False)
        model = nn.ParameterList([*self.params, *self.frozen])
        saved = copy.deepcopy(get_optimizer_state_dict(model, self.optimizer))
        self.optimizer = self.make_again()
        # A parameter may have no state yet.
        set_optimizer_state_dict(model, self.optimizer, saved, options=StateDictOptions(strict=False))

    # ---- surgery ----

    def operate(self, what):
        groups = self.optimizer.param_groups
        if what in ("add a group", "add to the base", "append"):
            self.add(what)
        elif what in ("remove", "replace", "resize"):
            self.change_one(what, groups[0])
        elif what == "reverse the groups":
            groups.reverse()
        elif what == "a frozen group":
            self.frozen.append(nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
            self.wrapped.add_param_group({"params": self.frozen[-1:]})
        elif what == "a parameter list":
            groups[0]["params"] = nn.ParameterList(groups[0]["params"])
        elif what == "forget the state":
            self.optimizer.state.clear()
        else:
            for name in {what} & set(groups[0]):
                groups[0][name] = groups[0][name] * 0.75

    def add(self, what):
        self.params.append(self.make_param(len(self.params) % 3))
        new = {"params": self.params[-1:]}
        if what == "add a group":
            self.wrapped.add_param_group({**new, "rho": 0.1})
        elif what == "add to the base":
            self.optimizer.base_optimizer.add_param_group(new)
            self.optimizer.param_groups[-1]["rho"] = 0.1
        else:
            self.optimizer.param_groups[0]["params"].append(self.params[-1])

    def change_one(self, what, group):
        """As Gaussian splatting does it."""
        params = list(group["params"])
        old = params[-1]
        if not old.requires_grad or (what == "remove" and len(params) == 1):
            return
        entries = self.optimizer.state.pop(old, None)
        old.grad = None
        if what == "remove":
            group["params"] = params[:-1]
        elif what == "resize":
            old.data = torch.cat([old.data, torch.ones(2, dtype=self.dtype)])
        else:
            new = nn.Parameter(old.detach().clone())
            group["params"] = [*params[:-1], new]
            self.params = [new if param is old else param for param in self.params]
            if entries is not None:
                self.optimizer.state[new] = entries

    # ---- what must be so ----

    def weights(self):
        return [param.detach().clone() for param in self.params]

    def assert_weights(self, weights):
        for param, before in zip(self.params, weights, strict=True):
            assert torch.equal(param.detach(), before)

    def assert_like(self, twin):
        # Gradients elsewhere in memory are added up in another order, which may turn a rounding over.
        tolerance = 1e-4 if self.dtype != torch.bfloat16 else 0.05
        for i, (one, other) in enumerate(zip(self.params, twin.params, strict=True)):
            torch.testing.assert_close(
                one.detach(), other.detach(), rtol=tolerance, atol=tolerance, msg=f"parameter {i}"
            )


def is_ordinary(grad):
    """Whether autograd may have made the gradient: it can be zeroed in place and added to."""
    return type(grad) is torch.Tensor and not grad.is_inference() and not grad.requires_grad


def in_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file)
