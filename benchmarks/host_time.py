"""Measures what a step costs beside the arithmetic: the host's time, and on a GPU launches and memory."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import implementations, operations
from benchmarks.device import Device, Step, reason_of
from benchmarks.implementations import BASES, FUSED_BASE, RHO
from benchmarks.measure import Gradients, Timing
from benchmarks.operations import BACKENDS, KERNELS
from benchmarks.records import CHANGING_LR, NEW_GRADIENTS, STATIC, HostTime
from fastsam import FastSAM

BASE = "SGD"
WARM_UP = 10
MOST_REPEATS = 2000


def host_time(device: Device, model: str, shapes: Sequence[tuple[int, ...]], seconds: float) -> HostTime:
    """Every backend's optimizer part and one fused step of the base alone; on the CPU with launches that do nothing.

    Args:
        device: what to measure on.
        model: the model's name.
        shapes: its parameters; with stubbed launches their sizes do not matter and are 8 elements.
        seconds: for each implementation and each of the three kinds of step.
    """
    stubbed = not device.asynchronous
    times, skipped = {}, {}
    for name in (*(KERNELS if stubbed else BACKENDS), FUSED_BASE):
        try:
            with _launching(name) if stubbed else contextlib.nullcontext():
                times[name] = _of_implementation(device, name, [(8,)] * len(shapes) if stubbed else shapes, seconds)
        except Exception as error:
            skipped[name] = reason_of(error)
    launches: dict[str, dict[str, int]] = {}
    extra_copies: dict[str, float] = {}
    if not stubbed:
        for name in times:
            launches[name] = _launches(device, name, shapes)
        base = _peak(device, FUSED_BASE, shapes)
        size = sum(4 * torch.Size(shape).numel() for shape in shapes)
        extra_copies = {name: (_peak(device, name, shapes) - base) / size for name in times if name != FUSED_BASE}
    return HostTime(
        model=model,
        base=BASE,
        parameters=sum(torch.Size(shape).numel() for shape in shapes),
        tensors=len(shapes),
        rounds=0,
        times=times,
        skipped=skipped,
        stubbed=stubbed,
        launches=launches,
        extra_copies=extra_copies,
    )


def _launching(name: str) -> contextlib.AbstractContextManager[None]:
    return implementations.stubbed_fused_base() if name == FUSED_BASE else operations.stubbed_launches(name)


def _of_implementation(
    device: Device, name: str, shapes: Sequence[tuple[int, ...]], seconds: float
) -> dict[str, Timing]:
    params, optimizer, step = _prepare(device, name, shapes)
    gradients = Gradients(shapes, device=device.type)
    groups = optimizer.param_groups

    def change_lr() -> None:
        gradients.hand_to(params)
        for group in groups:
            group["lr"] *= 0.999

    return {
        STATIC: _repeated(device, step, lambda: None, seconds),
        NEW_GRADIENTS: _repeated(device, step, lambda: gradients.hand_to(params), seconds),
        CHANGING_LR: _repeated(device, step, change_lr, seconds),
    }


def _prepare(
    device: Device, name: str, shapes: Sequence[tuple[int, ...]]
) -> tuple[list[Tensor], torch.optim.Optimizer, Step]:
    params = [torch.randn(shape, device=device.type).mul_(0.02).requires_grad_() for shape in shapes]
    Gradients(shapes, device=device.type).hand_to(params)
    base_class, options = BASES[BASE]
    if name == FUSED_BASE:
        base = base_class(params, fused=True, **options)
        return params, base, base.step
    # "auto" is stubbed as well as the backend's own name; the name says which one is meant.
    optimizer = FastSAM(params, base_class, rho=RHO, backend=name, **options)

    def step() -> None:
        optimizer.first_step(zero_grad=False)
        optimizer.second_step()

    return params, optimizer, step


def _repeated(device: Device, step: Step, prepare: Callable[[], None], seconds: float) -> Timing:
    for _ in range(WARM_UP):
        prepare()
        step()
    taken: list[float] = []
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(taken) < 2 or (time.perf_counter() < end and len(taken) < MOST_REPEATS):
            prepare()
            device.synchronize()
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    finally:
        gc.enable()
    device.synchronize()
    return Timing.of(taken)


def _launches(device: Device, name: str, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    _, _, step = _prepare(device, name, shapes)
    for _ in range(3):
        step()
    return device.launches(step)


def _peak(device: Device, name: str, shapes: Sequence[tuple[int, ...]]) -> int:
    """Over the first steps, which allocate the state."""
    device.release_memory()
    _, _, step = _prepare(device, name, shapes)
    return device.peak_bytes(lambda: [step() for _ in range(3)])
