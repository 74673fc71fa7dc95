"""What the tests run over, as data: backends, dtypes, precisions, base optimizers, methods.

A new fused base is an entry in ``FUSED_VARIANTS``, a new method one in ``METHODS`` (its algorithm: oracle.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import oracle
import pytest
import torch

from fastsam import methods

# ---- backends, dtypes, precisions ----

# The others compute with temporaries, and where reading a number costs nothing with Python's numbers.
KERNEL_BACKENDS = ("native", "triton")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
LOW_DTYPES = (torch.bfloat16, torch.float16)

# How parameters of a low dtype are stored, besides rounding to nearest.
PRECISIONS = {
    "stochastic": {"rounding": "stochastic", "rounding_seed": 7},
    "masters": {"master_weights": True},
    "stochastic-masters": {"rounding": "stochastic", "rounding_seed": 7, "master_weights": True},
}
WITH_MASTERS = tuple(name for name, options in PRECISIONS.items() if "master_weights" in options)


# ---- base optimizers ----


class Base(NamedTuple):
    cls: type[torch.optim.Optimizer]
    options: dict


# One with a state tensor, one with two and a count of steps, and one that runs by its own step().
BASES = {
    "sgd": Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": Base(torch.optim.AdamW, {"lr": 0.01}),
    "rmsprop": Base(torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
}
FUSED_BASES = ("sgd", "adamw")

# The fused bases with each kind of state that they have.
FUSED_VARIANTS = {
    "sgd-plain": Base(torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "sgd-momentum": Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    "sgd-nesterov": Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": Base(torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": Base(torch.optim.AdamW, {"lr": 0.01}),
    "adamw-amsgrad": Base(torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
}
STATEFUL_VARIANTS = tuple(name for name in FUSED_VARIANTS if name != "sgd-plain")


# ---- methods ----


@dataclass(frozen=True)
class MethodCase:
    """A method with its options, and what is known of it.

    Attributes:
        oracle: the passes of a step in float64.
        passes: how often a step calls its closure, from the first step on; repeated.
        ascents: how many of a step's passes are followed by ``first_step()``.
        state: the name of the method's buffer in ``state``.
    """

    method: methods.Method
    oracle: Callable
    passes: tuple[int, ...] = (2,)
    ascents: int = 1
    state: str | None = None

    def passes_of(self, step: int) -> int:
        return self.passes[step % len(self.passes)]


METHODS = {
    "sam": MethodCase(methods.SAM(), oracle.sam),
    "sam-p1.5": MethodCase(methods.SAM(p=1.5), oracle.sam_of_p(1.5)),
    "sam-p4": MethodCase(methods.SAM(p=4), oracle.sam_of_p(4)),
    "sam-inf": MethodCase(methods.SAM(p=math.inf), oracle.sam_of_p(math.inf)),
    "sam-3-steps": MethodCase(methods.SAM(inner_steps=3), oracle.sam_in_steps(3), (4,), ascents=3),
    "sam-projected": MethodCase(methods.SAM(inner_steps=2, inner_lr=0.8), oracle.sam_in_steps(2, 0.8), (3,), ascents=2),
    "asam": MethodCase(methods.ASAM(), oracle.asam),
    "gsam": MethodCase(methods.GSAM(), oracle.gsam),
    "wsam": MethodCase(methods.WSAM(), oracle.wsam_decoupled),
    "wsam-coupled": MethodCase(methods.WSAM(decouple=False), oracle.wsam_coupled),
    "looksam": MethodCase(methods.LookSAM(), oracle.looksam(), (2, 1, 1, 1, 1), state="fastsam_direction"),
    "looksam-k2": MethodCase(
        methods.LookSAM(k=2, alpha=0.3), oracle.looksam(2, 0.3), (2, 1), state="fastsam_direction"
    ),
    "friendly": MethodCase(methods.FriendlySAM(), oracle.friendly, state="fastsam_average"),
    "momentum": MethodCase(methods.MomentumSAM(), oracle.momentum_sam, (1,), ascents=0),
    "amp": MethodCase(methods.AMP(), oracle.amp()),
    "amp-3-steps": MethodCase(methods.AMP(3, 0.2, 0.3), oracle.amp(3, 0.2, 0.3), (4,), ascents=3),
    "stable": MethodCase(methods.StableSAM(), oracle.stable_sam),
    "vasso": MethodCase(methods.VaSSO(), oracle.vasso, state="fastsam_average"),
    "unified": MethodCase(methods.UnifiedSAM(), oracle.unified_sam),
    "sagm": MethodCase(methods.SAGM(), oracle.sagm),
    "lesam": MethodCase(methods.LESAM(0.05, total_steps=10), oracle.lesam(10, 0.05)),
    "zsharp": MethodCase(methods.ZSharp(), oracle.zsharp),
    "gcsam": MethodCase(methods.GCSAM(), oracle.gcsam),
    "esam": MethodCase(methods.ESAM(0.5, seed=3), oracle.esam(0.5, 3)),
    "awp": MethodCase(methods.AWP(gamma=0.1), partial(oracle.awp, gamma=0.1)),
}


# ---- parametrisations ----


def by_default(cases, chosen):
    """All cases, for ``parametrize``: those that are not ``chosen`` are in the thorough tier."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else [case]), marks=() if case in chosen else pytest.mark.thorough
        )
        for case in cases
    ]


every_base = pytest.mark.parametrize("base", BASES)
every_fused_base = pytest.mark.parametrize("base", FUSED_BASES)
every_variant = pytest.mark.parametrize("variant", FUSED_VARIANTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
low_dtypes = pytest.mark.parametrize("dtype", LOW_DTYPES, ids=["bfloat16", "float16"])
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
with_masters = pytest.mark.parametrize("precision", WITH_MASTERS)
every_method = pytest.mark.parametrize("name", METHODS)
kernel_backends = pytest.mark.parametrize("backend", KERNEL_BACKENDS, indirect=True)
first_or_later = pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
