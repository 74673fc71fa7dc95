"""What the fuzzer draws of an optimizer's surroundings, and what carries it out.

A life is an optimizer with a method, a base and a precision, a wrapper around it, and operations. Its twin, plain and
undisturbed, takes the same steps by ``step(closure)``: both must have the same weights after every operation. What a
life may contain, as a grammar::

    life      = method base precision wrapper operation*
    operation = step | refusal | resume | surgery
    step      = ("closure" | "two phases" | "scaled" | "fails" | "given up") gradients
    gradients = "plain" | "subclass" | "wrapper subclass" | "numpy" | "flat" | "held" | "zeroed in place"
    refusal   = "another optimizer steps" | "weights are loaded" | "state_dict" | "add_param_group" | "deepcopy"
    resume    = "saved" | "by the base" | "pickled" | "deepcopy" | "with another SAM's entries"
    surgery   = "add a group" | "reverse the groups" | "a frozen group" | "a parameter list" | "lr" | "rho"
"""

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from fastsam import FastSAM, methods

# ---- what is drawn ----

STEPS = ("closure", "two phases", "scaled", "fails", "given up")
GRADIENTS = ("plain", "subclass", "wrapper subclass", "numpy", "flat", "held", "zeroed in place")
REFUSALS = ("another optimizer steps", "weights are loaded", "state_dict", "add_param_group", "deepcopy")
RESUMES = ("saved", "by the base", "pickled", "deepcopy", "with another SAM's entries")
SURGERY = ("add a group", "reverse the groups", "a frozen group", "a parameter list", "lr", "rho")
METHODS = (
    methods.SAM(),
    methods.SAM(inner_steps=2),
    methods.ASAM(),
    methods.GSAM(),
    methods.WSAM(),
    methods.LookSAM(k=2),
    methods.FriendlySAM(),
    methods.MomentumSAM(),
)
BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
}
PRECISIONS = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "masters": (torch.bfloat16, {"master_weights": True}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic", "rounding_seed": 3}),
}
WRAPPERS = ("none", "copies", "forwards", "view")


@dataclass(frozen=True)
class Step:
    way: str
    gradients: str


@dataclass(frozen=True)
class Refusal:
    what: str


@dataclass(frozen=True)
class Resume:
    how: str


@dataclass(frozen=True)
class Surgery:
    what: str


@dataclass(frozen=True)
class Life:
    method: methods.Method
    base: str
    precision: str
    wrapper: str
    operations: tuple


steps = st.builds(Step, st.sampled_from(STEPS), st.sampled_from(GRADIENTS))
operations = st.one_of(
    steps,
    steps,
    st.builds(Refusal, st.sampled_from(REFUSALS)),
    st.builds(Resume, st.sampled_from(RESUMES)),
    st.builds(Surgery, st.sampled_from(SURGERY)),
)


@st.composite
def lives(draw):
    method = draw(st.sampled_from(METHODS))
    base = draw(st.sampled_from(sorted(BASES) if method.needs_first_pass else ["AdamW", "SGD"]))
    fused = base != "RMSprop"
    precision = draw(st.sampled_from(sorted(PRECISIONS) if fused else ["float32", "float64"]))
    first, last = Step("closure", "plain"), draw(steps)
    middle = draw(st.lists(operations, min_size=1, max_size=8))
    return Life(method, base, precision, draw(st.sampled_from(WRAPPERS)), (first, *middle, last))


# ---- wrappers ----


class Copies:
    """As Lightning Fabric's: a subclass of the optimizer's class with a copy of its ``__dict__``."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("state_dict", "step")}
        self.__class__ = type("Wrapped", (self.__class__, optimizer.__class__), {})
        self._optimizer = optimizer

    def step(self, closure=None):
        return self._optimizer.step(**({} if closure is None else {"closure": closure}))


class Forwards:
    """As Lightning's: it has nothing but looks everything up; its ``step()`` passes a closure that does nothing."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (self.__class__, optimizer.__class__), {})

    def step(self, closure=None):
        return self._optimizer.step(closure or (lambda: None))

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


WRAP = {"none": lambda optimizer: optimizer, "copies": Copies, "forwards": Forwards, "view": copy.copy}


class Subclass(torch.Tensor):
    """A gradient of another class, with memory of its own."""


class Planned(Exception):
    """What a failing closure raises."""


# ---- what carries a life out ----


def run(backend, life):
    mine, twin = Subject(backend, life, life.wrapper), Subject(backend, life, "none")
    for operation in life.operations:
        mine.carry_out(operation)
        twin.follow(operation)
        mine.assert_like(twin)


class Subject:
    """Parameters and their optimizer, with a gradient that is a function of the weights."""

    def __init__(self, backend, life, wrapper):
        self.backend, self.life, self.wrapper = backend, life, wrapper
        self.base, options = BASES[life.base]
        self.dtype, precision = PRECISIONS[life.precision]
        self.options = {**options, **precision, "method": life.method, "backend": backend}
        self.params = [self.make_param(i) for i in range(3)]
        self.frozen, self.held, self.memory = [], [], {}
        self.optimizer = FastSAM(self.params, self.base, rho=0.2, **self.options)
        self.wrapped = WRAP[wrapper](self.optimizer)

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
        if isinstance(operation, Step) and operation.way not in ("fails", "given up"):
            self.optimizer.step(self.closure("plain"))
        elif isinstance(operation, Surgery):
            self.operate(operation.what)

    def closure(self, gradients, scale=1.0):
        def closure():
            for i, param in enumerate(self.params):
                self.give(i, param, (param.detach().double() ** 3 - 0.3 * param.detach()).mul(scale), gradients)

        return closure

    def give(self, i, param, grad, kind):
        grad = grad.to(param.dtype)
        if kind == "zeroed in place" and param.grad is not None and type(param.grad) is torch.Tensor:
            param.grad.zero_().add_(grad)
            return
        if kind == "numpy" and param.dtype != torch.bfloat16:
            memory = self.memory.setdefault((i, kind), torch.empty_like(grad).numpy())
            memory[:] = grad.numpy()
            grad = torch.from_numpy(memory)
        elif kind == "flat":
            memory = self.memory.setdefault("flat", torch.zeros(1024, dtype=param.dtype))
            grad = memory[64 * i : 64 * i + grad.numel()].copy_(grad)
        elif kind == "held":
            self.held = [*self.held[-4:], grad]
        elif kind == "subclass":
            grad = grad.as_subclass(Subclass)
        elif kind == "wrapper subclass":
            grad = AsyncCollectiveTensor(grad)
        param.grad = grad

    def step(self, operation):
        way, weights = operation.way, self.weights()
        closure = self.closure(operation.gradients)
        if way == "closure":
            self.wrapped.step(closure)
        elif way == "fails":
            self.fail(closure)
            self.assert_weights(weights)
        elif way == "given up":
            self.first_phase(closure)
            self.optimizer.restore()
            self.assert_weights(weights)
        else:
            scale = 1024.0 if way == "scaled" and self.dtype != torch.bfloat16 else 1.0
            closure = self.closure(operation.gradients, scale)
            self.first_phase(closure)
            closure()
            if scale != 1.0:
                self.wrapped.grad_scale, self.wrapped.found_inf = torch.tensor(scale), torch.tensor(0.0)
            (self.wrapped.step if way == "scaled" else self.wrapped.second_step)()
            if scale != 1.0:
                del self.wrapped.grad_scale, self.wrapped.found_inf

    def first_phase(self, closure):
        """All of a step but its last backward pass and the update."""
        if self.life.method.needs_first_pass:
            closure()
        while self.wrapped.first_step() and self.optimizer._engine.ascents < self.life.method.ascents:
            closure()

    def fail(self, closure):
        def failing():
            closure()
            if self.optimizer.perturbed or not self.optimizer._ascends_now():
                raise Planned

        with pytest.raises(Planned):
            self.wrapped.step(failing)

    def refuse(self, what):
        """Begins a step, does what is refused, and gives the step up."""
        weights = self.weights()
        self.first_phase(self.closure("plain"))
        if self.optimizer.perturbed:
            if what in ("another optimizer steps", "weights are loaded"):
                self.closure("plain")()
                if what == "another optimizer steps":
                    torch.optim.SGD(self.params[-1:], lr=0.1).step()
                else:
                    nn.ParameterList(self.params).load_state_dict(nn.ParameterList(self.params).state_dict())
                with pytest.raises(RuntimeError, match="was written to while it was perturbed"):
                    self.wrapped.second_step()
            else:
                with pytest.raises(RuntimeError, match="not possible while the weights are perturbed"):
                    self.call_refused(what)
        self.optimizer.restore()
        self.assert_weights(weights)

    def call_refused(self, what):
        if what == "state_dict":
            self.wrapped.state_dict()
        elif what == "add_param_group":
            self.wrapped.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        else:
            copy.deepcopy(self.optimizer)

    def resume(self, how):
        if how in ("pickled", "deepcopy"):
            pair = self.params, self.frozen, self.optimizer
            pair = pickle.loads(pickle.dumps(pair)) if how == "pickled" else copy.deepcopy(pair)
            self.params, self.frozen, self.optimizer = pair
        else:
            file = io.BytesIO()
            torch.save(self.wrapped.state_dict(), file)
            file.seek(0)
            saved = torch.load(file)
            if how == "with another SAM's entries":
                for entries in saved["state"].values():
                    entries["old_p"] = torch.zeros(2)
            groups = [{"params": list(group["params"])} for group in self.optimizer.param_groups]
            self.optimizer = FastSAM(groups, self.base, rho=0.1, **self.options)
            (self.optimizer.base_optimizer if how == "by the base" else self.optimizer).load_state_dict(saved)
        self.wrapped = WRAP[self.wrapper](self.optimizer)

    def operate(self, what):
        groups = self.optimizer.param_groups
        if what == "add a group":
            self.params.append(self.make_param(len(self.params) % 3))
            self.wrapped.add_param_group({"params": self.params[-1:], "rho": 0.1})
        elif what == "reverse the groups":
            groups.reverse()
        elif what == "a frozen group":
            self.frozen.append(nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
            self.wrapped.add_param_group({"params": self.frozen[-1:]})
        elif what == "a parameter list":
            groups[0]["params"] = nn.ParameterList(groups[0]["params"])
        else:
            groups[0][what] = groups[0][what] * 0.75

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
