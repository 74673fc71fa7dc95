"""What is measured side by side: each implementation's optimizer part of one step, as a function without arguments."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks import operations
from benchmarks.operations import BACKENDS
from benchmarks.plain import CompiledSAM, ListSAM, LoopSAM
from fastsam import FastSAM

LOOP = "loop"
PEER = "pytorch_optimizer.SAM"
PEER_IN_LISTS = "pytorch_optimizer.SAM(foreach=True)"
HEAVYBALL = "heavyball.SAMWrapper"
LISTS = "lists"
LISTS_ON_HOST = "lists, scale on the host"
COMPILED = "compiled lists"
FUSED_BASE = "one fused base step"

PLAIN_PYTORCH = (LISTS, LISTS_ON_HOST, COMPILED)
NEED_A_COMPILER = (COMPILED, HEAVYBALL)

# What each one has the device do, in bytes per float32 parameter; the base's update is 20 (SGD) or 28 (AdamW), of which
# the weights are 8.
DESCRIPTIONS = {
    LOOP: "per tensor: 1.0 * g (8), norm (4), clone (8), 1.0 * g (8), * scale (8), add_ (12); the base by its default",
    PEER: "the published package, tensor by tensor, over the base by its default",
    PEER_IN_LISTS: "the same with its lists: restores in place; clones its backups anew in every step, keeps no masters"
    " and does not restore after an exception",
    HEAVYBALL: "the published package, compiled: perturbs by ball * w^2 * g, without any norm (neither SAM nor ASAM as"
    " published), zeroes the first gradients, needs a closure",
    LISTS: "_foreach_norm (4), _foreach_copy_ (8), _foreach_mul by the scale (8), _foreach_add_ (12), _foreach_copy_"
    " back (8), fused base",
    LISTS_ON_HOST: "_foreach_norm (4), wait for the scale, _foreach_copy_ (8), _foreach_add_ with alpha (12),"
    " _foreach_copy_ back (8), fused base",
    COMPILED: "the first of these and the base's update written out, in two functions under torch.compile: norms (4),"
    " one pass for backup and perturbation (16), one for restore and update (20 or 28)",
    FUSED_BASE: "torch.optim with fused=True: no SAM at all",
}

# Gradients are made up: the learning rate only has to keep the weights finite.
BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3}),
}
RHO = 0.05


class Implementation(NamedTuple):
    """What a round visits: a step, and whose it is."""

    step: Callable[[], Any]
    optimizer: Any


def names(device_type: str, *, compiled: bool = False) -> tuple[list[str], dict[str, str]]:
    """What there is to measure on a device, in the order of a round, and what there is not, with the reason."""
    chosen = [LOOP, PEER_IN_LISTS] if device_type == "cuda" else [LOOP, PEER, PEER_IN_LISTS]
    if device_type == "cuda" or compiled:
        chosen += [LISTS, LISTS_ON_HOST]
    chosen += NEED_A_COMPILER if compiled else ()
    skipped = {}
    for name, package in ((PEER, "pytorch_optimizer"), (PEER_IN_LISTS, "pytorch_optimizer"), (HEAVYBALL, "heavyball")):
        if name in chosen and importlib.util.find_spec(package) is None:
            chosen.remove(name)
            skipped[name] = f"{package} is not installed"
    for backend in BACKENDS:
        if reason := operations.obstacle(backend, device_type):
            skipped[backend] = reason
        else:
            chosen.append(backend)
    return [*chosen, FUSED_BASE], skipped


def build(name: str, params: list[Tensor], base: str, **compile_options: Any) -> Implementation:
    """The implementation ``name`` over ``params``: one of the names at the top of this file.

    Args:
        name: ``LOOP`` ... ``FUSED_BASE``, or one of ``BACKENDS``.
        params: the parameters; they must have gradients when a step is taken.
        base: one of ``BASES``.
        compile_options: ``COMPILED``'s.
    """
    base_class, options = BASES[base]
    if name == FUSED_BASE:
        alone = base_class(params, fused=True, **options)
        return Implementation(alone.step, alone)
    if name == HEAVYBALL:
        return _heavyball(params, base)
    optimizer: Any
    if name in BACKENDS:
        optimizer = FastSAM(params, base_class, rho=RHO, backend=name, **options)
    elif name in (PEER, PEER_IN_LISTS):
        from pytorch_optimizer import SAM

        lists = {"foreach": True} if name == PEER_IN_LISTS else {}
        optimizer = SAM(params, base_class, rho=RHO, **lists, **options)
    elif name in (LISTS, LISTS_ON_HOST):
        optimizer = ListSAM(params, base_class, rho=RHO, scale_on_host=name == LISTS_ON_HOST, **options)
    elif name == COMPILED:
        optimizer = CompiledSAM(params, base_class, rho=RHO, **compile_options, **options)
    elif name == LOOP:
        optimizer = LoopSAM(params, base_class, rho=RHO, **options)
    else:
        raise ValueError(f"there is no implementation {name!r}")
    keep_gradients = {"zero_grad": False} if name in BACKENDS else {}

    def step() -> None:
        optimizer.first_step(**keep_gradients)
        optimizer.second_step()

    return Implementation(step, optimizer)


def _heavyball(params: list[Tensor], base: str) -> Implementation:
    import heavyball

    wrapped = {"SGD": heavyball.SGD, "AdamW": heavyball.AdamW}[base](params, lr=BASES[base][1]["lr"])
    optimizer = heavyball.SAMWrapper(params, wrapped, ball=RHO)

    # It zeroes the first pass's gradients in place, and the benchmark's are shared. Zeros take as long.
    first_grads = [torch.zeros_like(p) for p in params]

    def step() -> None:
        passes = iter((first_grads, [p.grad for p in params]))

        def closure() -> None:
            for p, grad in zip(params, next(passes), strict=True):
                p.grad = grad

        optimizer.step(closure)

    return Implementation(step, optimizer)


@contextmanager
def stubbed_fused_base() -> Iterator[None]:
    """A block in which torch.optim's fused SGD does everything but its arithmetic."""
    with mock.patch.object(torch, "_fused_sgd_", operations.do_nothing):
        yield
