"""What the fuzzer draws of an optimizer's surroundings (fuzz_surroundings.py carries it out).

A life is an optimizer with a method, a base and a precision, a wrapper around it, a mode of torch's in which it is
called, and operations. As a grammar::

    life      = method base precision wrapper mode operation*
    method    = each of tests/registry.py, and RandomSAM
    base      = "SGD" | "AdamW" | "RMSprop" | "bytes" (state of uint8 that it loads by itself; it has no lr)
    wrapper   = "none" | "copies" | "forwards" | "view"
    mode      = "none" | "default device" | "default dtype" | "inference"
    operation = step | refusal | resume | surgery
    step      = way gradients
    way       = "closure" | "micro-batches" | "two phases" | "scaled" | "overflow" | "signal"
              | "fails" | "signal in a closure" | "given up" (of which nothing remains)
    gradients = "plain" | "autograd" | "autograd, zeroed" | "zeroed in place" | "subclass" | "wrapper subclass"
              | "numpy" | "flat" | "held" | "inference" | "lazy clone" | "with a graph"
    refusal   = "another optimizer steps" | "another FastSAM" | "weights are loaded" | "state_dict" | "add_param_group"
              | "deepcopy" | "a step within perturb_by" | "accumulation before a closure" (which warns)
    resume    = "saved" | "by the base" | "pickled" | "deepcopy" | "distributed checkpoint"
              | "with another SAM's entries" | "by way of another method"
    surgery   = "add a group" | "add to the base" | "reverse the groups" | "a frozen group" | "a parameter list"
              | "append" | "remove" | "replace" | "resize" | "forget the state" | "lr" | "rho"
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from registry import METHODS as METHOD_CASES

from fastsam import methods

LASTING = ("closure", "micro-batches", "two phases", "scaled", "signal")
UNDONE = ("overflow", "fails", "signal in a closure", "given up")
GRADIENTS = (
    "plain",
    "autograd",
    "autograd, zeroed",
    "zeroed in place",
    "subclass",
    "wrapper subclass",
    "numpy",
    "flat",
    "held",
    "inference",
    "lazy clone",
    "with a graph",
)
REFUSALS = (
    "another optimizer steps",
    "another FastSAM",
    "weights are loaded",
    "state_dict",
    "add_param_group",
    "deepcopy",
    "a step within perturb_by",
    "accumulation before a closure",
)
RESUMES = (
    "saved",
    "by the base",
    "pickled",
    "deepcopy",
    "distributed checkpoint",
    "with another SAM's entries",
    "by way of another method",
)
SURGERY = (
    "add a group",
    "add to the base",
    "reverse the groups",
    "a frozen group",
    "a parameter list",
    "append",
    "remove",
    "replace",
    "resize",
    "forget the state",
    "lr",
    "rho",
)
WRAPPERS = ("none", "copies", "forwards", "view")
MODES = ("none", "none", "default device", "default dtype", "inference")
# A loop with a scaler must unscale the gradients of both passes.
UNSCALED = (methods.FriendlySAM, methods.VaSSO, methods.SAGM, methods.AMP, methods.UnifiedSAM, methods.LESAM)
METHODS = (*(case.method for case in METHOD_CASES.values()), methods.RandomSAM())


class Bytes(torch.optim.Optimizer):
    """Knows exactly its own keys, has no lr, and keeps bytes and a global entry, which it loads by itself."""

    def __init__(self, params, size=0.05):
        groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
        assert all(set(group) <= {"params", "size"} for group in groups)
        super().__init__(groups, {"size": size})

    @torch.no_grad()
    def step(self, closure=None):
        self.state["steps"] = self.state.get("steps", 0) + 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                count = self.state[param].get("bytes", torch.zeros(param.shape, dtype=torch.uint8, device="cpu"))
                self.state[param]["bytes"] = count + 1
                param.sub_(group["size"] * param.grad / self.state[param]["bytes"])

    def load_state_dict(self, saved):
        super().load_state_dict(saved)
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in enumerate(params):
            if index in saved["state"]:
                self.state[param]["bytes"] = saved["state"][index]["bytes"].clone()


BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "bytes": (Bytes, {}),
}
PRECISIONS = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "masters": (torch.bfloat16, {"master_weights": True}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic", "rounding_seed": 3}),
}


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
    mode: str
    operations: tuple


steps = st.builds(Step, st.sampled_from([*LASTING, *UNDONE]), st.sampled_from(GRADIENTS))
operations = st.one_of(
    steps,
    steps,
    st.builds(Refusal, st.sampled_from(REFUSALS)),
    st.builds(Resume, st.sampled_from(RESUMES)),
    st.builds(Surgery, st.sampled_from(SURGERY)),
)


def bases_of(method):
    """The bases with which ``method`` is possible: MomentumSAM needs a momentum that it knows, some need an lr."""
    if isinstance(method, methods.MomentumSAM):
        return ["AdamW", "SGD"]
    needs_lr = isinstance(method, methods.WSAM | methods.LESAM)
    return [name for name in sorted(BASES) if name != "bytes" or not needs_lr]


@st.composite
def lives(draw):
    method = draw(st.sampled_from(METHODS))
    base = draw(st.sampled_from(bases_of(method)))
    precision = draw(st.sampled_from(sorted(PRECISIONS) if base in ("SGD", "AdamW") else ["float32", "float64"]))
    first, last = Step("closure", "plain"), draw(steps)
    middle = draw(st.lists(operations, min_size=1, max_size=8))
    wrapper, mode = draw(st.sampled_from(WRAPPERS)), draw(st.sampled_from(MODES))
    return Life(method, base, precision, wrapper, mode, (first, *middle, last))
