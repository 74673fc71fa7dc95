"""Whole training steps, forward and backward included, as visits of a round."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.device import Device, Step
from benchmarks.implementations import BASES, LOOP, RHO
from benchmarks.measure import STEP, Seconds, Visit, timed_step
from benchmarks.methods import METHODS, SAM, period
from benchmarks.networks import Network
from benchmarks.plain import LoopSAM
from benchmarks.records import IN_A_GRAPH, OPTIMIZER
from fastsam import FastSAM

FASTSAM = "FastSAM"
HALF_BATCH = "FastSAM, ascent_closure on half the batch"
# The same as graphs: their time is the device's alone, however slow the host is.
FASTSAM_IN_A_GRAPH = f"{FASTSAM} {IN_A_GRAPH}"
HALF_BATCH_IN_A_GRAPH = f"{HALF_BATCH}, {IN_A_GRAPH}"
SCHEDULED = "FastSAM in every fourth step"
SCHEDULE_PERIOD = 4


def of_method(name: str) -> str:
    """What the row of a method is called."""
    return FASTSAM if name == SAM else f"FastSAM, {name}"


def rows(network: Network, device_type: str, *, methods: bool) -> list[str]:
    """The implementations, the first being the base alone."""
    more = [of_method(name) for name in METHODS if name != SAM] if methods else []
    graphs = [f"{network.base} {IN_A_GRAPH}", FASTSAM_IN_A_GRAPH, HALF_BATCH_IN_A_GRAPH]
    return [network.base, LOOP, FASTSAM, HALF_BATCH, *(graphs if device_type == "cuda" else []), SCHEDULED, *more]


class Pass:
    """A forward and a backward pass, as a closure that counts its own seconds; on a GPU under bfloat16 autocast."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self._model, self._inputs, self._targets = model, inputs, targets
        self.seconds = 0.0

    def __call__(self) -> Tensor:
        start = time.perf_counter()
        self._model.zero_grad()
        with torch.autocast(self._inputs.device.type, torch.bfloat16, enabled=self._inputs.is_cuda):
            loss = F.cross_entropy(self._model(self._inputs), self._targets)
        loss.backward()
        self.seconds += time.perf_counter() - start
        return loss


def prepare(network: Network, device: Device, row: str) -> Visit:
    """A visit that takes one step of an implementation, or the mean of a method's whole period."""
    torch.manual_seed(0)
    model = network.build().to(device.type)
    network.on(model)
    inputs, targets = network.examples(device.type)
    count = network.batch // 2
    full, half = Pass(model, inputs, targets), Pass(model, inputs[:count], targets[:count])
    step = _step(network, device, row, list(model.parameters()), full, half)
    steps = next((period(name) for name in METHODS if row == of_method(name)), 1)
    steps = SCHEDULE_PERIOD if row == SCHEDULED else steps

    def visit() -> Seconds:
        full.seconds = half.seconds = 0.0
        seconds = timed_step(device, lambda: [step() for _ in range(steps)])
        if not device.asynchronous:
            seconds[OPTIMIZER] = seconds[STEP] - full.seconds - half.seconds
        return {part: elapsed / steps for part, elapsed in seconds.items()}

    return visit


def _step(network: Network, device: Device, row: str, params: list[Tensor], full: Pass, half: Pass) -> Step:
    base_class, options = BASES[network.base]
    if not row.endswith(IN_A_GRAPH):
        return _eager(base_class, options, row, params, full, half)
    options = {**options, "capturable": True} if network.base == "AdamW" else options
    return device.capture(_eager(base_class, options, row.removesuffix(IN_A_GRAPH).rstrip(", "), params, full, half))


def _eager(
    base_class: type[Optimizer], options: dict[str, Any], row: str, params: list[Tensor], full: Pass, half: Pass
) -> Step:
    if row == base_class.__name__:
        return _one_pass(base_class(params, fused=True, **options), full)
    if row == LOOP:
        return _two_passes(LoopSAM(params, base_class, rho=RHO, **options), full)
    if row == HALF_BATCH:
        optimizer = FastSAM(params, base_class, rho=RHO, **options)
        return lambda: optimizer.step(full, ascent_closure=half)
    if row == SCHEDULED:
        optimizer = FastSAM(
            params, base_class, rho=RHO, schedule=lambda number: number % SCHEDULE_PERIOD == 0, **options
        )
        return lambda: optimizer.step(full)
    method = next(METHODS[name] for name in METHODS if row == of_method(name))
    optimizer = FastSAM(params, base_class, rho=RHO, method=method, **options)
    return lambda: optimizer.step(full)


def _one_pass(optimizer: Optimizer, full: Callable[[], Any]) -> Step:
    def step() -> None:
        full()
        optimizer.step()

    return step


def _two_passes(optimizer: LoopSAM, full: Callable[[], Any]) -> Step:
    def step() -> None:
        full()
        optimizer.first_step()
        full()
        optimizer.second_step()

    return step
