"""Measures what a step costs beside the arithmetic: the host's time, and on a GPU launches and memory."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time

import torch
from torch import Tensor

from benchmarks import implementations, operations
from benchmarks.device import Device, Step, reason_of
from benchmarks.implementations import FUSED_BASE, Implementation
from benchmarks.measure import Gradients, Timing
from benchmarks.operations import BACKENDS, KERNELS
from benchmarks.records import CHANGING_LR, NEW_GRADIENTS, STATIC, WATCH, HostTime
from benchmarks.shapes import Shapes, shapes_of, sizes
from fastsam.runtime.accumulation import AccumulationWatch

BASE = "SGD"
WARM_UP, MOST_REPEATS = 10, 2000


def host_time(device: Device, model: str, seconds: float, frozen: int = 0) -> HostTime:
    """Every backend's optimizer part, and one fused step of the base alone.

    Args:
        device: what to measure on; on the CPU the kernels' backends run their path for CUDA, launches stubbed out.
        model: whose parameters; where nothing is launched they have 8 elements each.
        seconds: for each implementation and each kind of step.
        frozen: how many more parameters the optimizer is given, which have no gradient.
    """
    stubbed = not device.asynchronous
    shapes = [(8,)] * len(shapes_of(model)) if stubbed else shapes_of(model)
    times, skipped, launches, peaks = {}, {}, {}, {}
    for name in (FUSED_BASE, *(KERNELS if stubbed else BACKENDS)):
        try:
            with _stubbed(name) if stubbed else contextlib.nullcontext():
                times[name] = _kinds_of_step(device, name, shapes, seconds, frozen)
            if not stubbed:
                launches[name] = device.launches(_warmed_up(*_build(device, name, shapes, frozen)))
                peaks[name] = _peak(device, name, shapes)
        except Exception as error:
            skipped[name] = reason_of(error)
    times[WATCH] = _watch(device, shapes, seconds)
    size = 4 * int(sizes(model)["parameters"])
    extra = {name: (peak - peaks[FUSED_BASE]) / size for name, peak in peaks.items() if name != FUSED_BASE}
    return HostTime(
        **sizes(model),
        base=BASE,
        times=times,
        skipped=skipped,
        stubbed=stubbed,
        frozen=frozen,
        launches=launches,
        extra_copies=extra,
    )


def _stubbed(name: str) -> contextlib.AbstractContextManager[None]:
    return implementations.stubbed_fused_base() if name == FUSED_BASE else operations.stubbed_launches(name)


def _kinds_of_step(device: Device, name: str, shapes: Shapes, seconds: float, frozen: int) -> dict[str, Timing]:
    params, implementation = _build(device, name, shapes, frozen)
    gradients = Gradients(shapes, device=device.type)

    def change_lr() -> None:
        gradients.hand_to(params)
        implementation.optimizer.param_groups[0]["lr"] *= 0.999

    kinds = {STATIC: lambda: None, NEW_GRADIENTS: lambda: gradients.hand_to(params), CHANGING_LR: change_lr}
    return {kind: _repeated(device, implementation.step, prepare, seconds) for kind, prepare in kinds.items()}


def _watch(device: Device, shapes: Shapes, seconds: float) -> dict[str, Timing]:
    """What ``step(closure)`` spends on looking for gradients of earlier backward passes."""
    params, _ = _build(device, FUSED_BASE, shapes)
    smallest = min(params, key=Tensor.numel)  # the one that stands for all
    grads = itertools.cycle([torch.ones_like(smallest), torch.ones_like(smallest)])

    def replace_grad() -> None:
        smallest.grad = next(grads)

    def repeated(closure: Step) -> Timing:
        watch = AccumulationWatch()

        def step() -> None:
            watch.begin_closure(params)
            closure()
            watch.end_closure()
            watch.end_step(params)

        step()
        return _repeated(device, step, lambda: None, seconds)

    return {STATIC: repeated(lambda: None), NEW_GRADIENTS: repeated(replace_grad)}


def _build(device: Device, name: str, shapes: Shapes, frozen: int = 0) -> tuple[list[Tensor], Implementation]:
    params = [torch.randn(shape, device=device.type).mul_(0.02).requires_grad_() for shape in shapes]
    Gradients(shapes, device=device.type).hand_to(params)
    others = [torch.zeros(8, device=device.type) for _ in range(frozen)]
    return params, implementations.build(name, [*others, *params], BASE)


def _repeated(device: Device, step: Step, prepare: Step, seconds: float) -> Timing:
    # With launches that do nothing all is this thread's work, of which a busy machine takes nothing.
    clock = time.perf_counter if device.asynchronous else time.thread_time
    taken: list[float] = []
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(taken) < WARM_UP + 2 or (time.perf_counter() < end and len(taken) < MOST_REPEATS):
            prepare()
            device.synchronize()
            start = clock()
            step()
            taken.append(clock() - start)
    finally:
        gc.enable()
    device.synchronize()
    return Timing.of(taken[WARM_UP:])


def _warmed_up(params: list[Tensor], implementation: Implementation) -> Step:
    for _ in range(3):
        implementation.step()
    return implementation.step


def _peak(device: Device, name: str, shapes: Shapes) -> int:
    """Over the first steps, which allocate the state."""
    device.release_memory()
    _, implementation = _build(device, name, shapes)
    return device.peak_bytes(lambda: [implementation.step() for _ in range(3)])
