"""Whole training steps, forward and backward included: what SAM costs a small CNN and a small transformer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.implementations import BASES, HALF_BATCH, LOOP, RHO, LoopSAM
from benchmarks.measure import STEP, Seconds, Visit, benchmarked
from benchmarks.methods import METHODS, SAM, period
from benchmarks.results import Results, TrainingStep
from fastsam import FastSAM, methods

FASTSAM = "FastSAM"


class CNN(nn.Sequential):
    """Three stages of convolutions with batch norm for 32 x 32 images."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, 128):
            for stride in (1, 2):
                convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(64, 3, 32, 32), torch.randint(10, (64,))


class Transformer(nn.Module):
    """Four encoder layers over 64 tokens."""

    def __init__(self, vocabulary: int = 1000, width: int = 256, length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.position)).transpose(1, 2)

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        return torch.randint(1000, (8, 64)), torch.randint(1000, (8, 64))


class Pass:
    """A forward and a backward pass, as a closure that counts its own seconds."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self._model, self._inputs, self._targets = model, inputs, targets
        self.seconds = 0.0

    def __call__(self) -> Tensor:
        start = time.perf_counter()
        self._model.zero_grad()
        loss = F.cross_entropy(self._model(self._inputs), self._targets)
        loss.backward()
        self.seconds += time.perf_counter() - start
        return loss


Step = Callable[[Pass, Pass], Any]


def base_alone(params: list[Tensor], base: str) -> Step:
    base_class, options = BASES[base]
    optimizer = base_class(params, **options)

    def step(full: Pass, half: Pass) -> None:
        full()
        optimizer.step()

    return step


def loop(params: list[Tensor], base: str) -> Step:
    base_class, options = BASES[base]
    optimizer = LoopSAM(params, base_class, **options)

    def step(full: Pass, half: Pass) -> None:
        full()
        optimizer.first_step()
        full()
        optimizer.second_step()

    return step


def fastsam(params: list[Tensor], base: str) -> Step:
    base_class, options = BASES[base]
    optimizer = FastSAM(params, base_class, rho=RHO, **options)
    return lambda full, half: optimizer.step(full)


def fastsam_half_batch(params: list[Tensor], base: str) -> Step:
    base_class, options = BASES[base]
    optimizer = FastSAM(params, base_class, rho=RHO, **options)
    return lambda full, half: optimizer.step(full, ascent_closure=half)


def fastsam_method(method: methods.Method) -> Callable[[list[Tensor], str], Step]:
    def build(params: list[Tensor], base: str) -> Step:
        base_class, options = BASES[base]
        optimizer = FastSAM(params, base_class, rho=RHO, method=method, **options)
        return lambda full, half: optimizer.step(full)

    return build


@pytest.mark.parametrize(("architecture", "base"), [(CNN, "SGD"), (Transformer, "AdamW")], ids=["CNN", "transformer"])
def test_training_step(
    architecture: type[CNN] | type[Transformer], base: str, benchmark: Any, results: Results
) -> None:
    visits: dict[str, Visit] = {}
    builds = {base: base_alone, LOOP: loop, FASTSAM: fastsam, HALF_BATCH: fastsam_half_batch}
    builds |= {f"FastSAM, {name}": fastsam_method(method) for name, method in METHODS.items() if name != SAM}
    for name, build in builds.items():
        torch.manual_seed(0)
        model = architecture()
        # LookSAM's steps are not alike: a visit is one period of them.
        steps = period(METHODS.get(name.removeprefix("FastSAM, "), METHODS[SAM]))
        visits[name] = one_visit(build(list(model.parameters()), base), model, *architecture.batch(), steps)
    sizes = [p.numel() for p in model.parameters()]
    # Rounds are long here: with fewer of them a hundredth cannot be told from noise.
    rounds = benchmarked(visits, benchmark, 4 * results.seconds)
    results.training_step.append(
        TrainingStep(architecture.__name__, base, sum(sizes), len(sizes), rounds.count, rounds.measured)
    )


def one_visit(step: Step, model: nn.Module, inputs: Tensor, targets: Tensor, steps: int = 1) -> Visit:
    """The mean of so many steps."""
    full = Pass(model, inputs, targets)
    half = Pass(model, inputs[::2], targets[::2])

    def visit() -> Seconds:
        full.seconds = half.seconds = 0.0
        start = time.perf_counter()
        for _ in range(steps):
            step(full, half)
        seconds = time.perf_counter() - start
        optimizer = seconds - full.seconds - half.seconds
        return {STEP: seconds / steps, TrainingStep.OPTIMIZER: optimizer / steps}

    return visit
