"""The optimizer part of a step of every method, in units of SAM's."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.implementations import BACKENDS
from benchmarks.measure import STEP, Copy, Gradients, Visit, benchmarked
from benchmarks.methods import METHODS, MethodSteps, floor_bytes
from benchmarks.results import MethodsPart, Results
from benchmarks.shapes import MODELS

MODEL, BASE = "ResNet-18", "SGD"


def test_method_costs(benchmark: Any, results: Results) -> None:
    shapes = list(MODELS[MODEL]().values())
    torch.manual_seed(0)
    weights = [torch.randn(shape).mul_(0.02) for shape in shapes]
    gradients = Gradients(shapes)
    visits: dict[str, Visit] = {Copy.NAME: Copy().visit}
    for name, method in METHODS.items():
        steps = MethodSteps(method, [w.clone().requires_grad_() for w in weights], gradients, BASE, BACKENDS[-1])
        visits[name] = lambda steps=steps: {STEP: steps(time.perf_counter)}
    rounds = benchmarked(visits, benchmark, results.seconds)
    moved = {name: floor_bytes(method, BASE) for name, method in METHODS.items()}
    results.methods.append(MethodsPart.of(MODEL, BASE, shapes, rounds, bytes_per_parameter=moved))
