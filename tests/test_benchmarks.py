"""The benchmarks' own parts: shapes, the loop that figures are set against, tables, verdicts, picture, skips."""

# ruff: noqa: E402 - benchmarks/ is a package that is not installed: it has to be put in place before it is imported.

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT, import_benchmarks
from torch import Tensor

import_benchmarks()

from benchmarks import implementations, low_precision, measure, report
from benchmarks.implementations import (
    BACKENDS,
    COMPILED,
    FUSED_BASE,
    HALF_BATCH,
    LISTS,
    LISTS_ON_HOST,
    LOOP,
    PEER,
    UPDATE,
    LoopSAM,
)
from benchmarks.measure import STEP, Measured, Timing
from benchmarks.methods import METHODS, MethodSteps, floor_bytes, period
from benchmarks.results import AROUND, MethodsPart, OptimizerPart, Results, TrainingStep
from benchmarks.shapes import MODELS
from fastsam import FastSAM
from fastsam.backends import BackendUnavailable, load


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("ResNet-18", 62, 11_689_512),
        ("ResNet-50", 161, 25_557_032),
        ("WRN-28-10", 80, 36_479_194),
        ("ViT-B/16", 152, 86_567_656),
        ("GPT-2 small", 148, 124_439_808),
        ("Llama 1B", 146, 1_235_814_400),
        ("4 x 4096^2", 4, 67_108_864),
        ("2,000 x 256", 2000, 512_000),
    ],
)
def test_models_have_their_published_sizes(model: str, tensors: int, parameters: int) -> None:
    shapes = MODELS[model]()
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters


def test_names_and_order_are_the_models_own() -> None:
    resnet = list(MODELS["ResNet-50"]().items())
    assert resnet[:4] == [
        ("conv1.weight", (64, 3, 7, 7)),
        ("bn1.weight", (64,)),
        ("bn1.bias", (64,)),
        ("layer1.0.conv1.weight", (64, 64, 1, 1)),
    ]
    assert ("layer1.0.downsample.0.weight", (256, 64, 1, 1)) in resnet
    assert ("layer4.2.conv3.weight", (2048, 512, 1, 1)) in resnet
    assert resnet[-1] == ("fc.bias", (1000,))
    assert not any("layer1.0.downsample" in name for name in MODELS["ResNet-18"]())
    assert MODELS["ViT-B/16"]()["blocks.11.attn.qkv.weight"] == (2304, 768)
    assert MODELS["GPT-2 small"]()["transformer.h.0.attn.c_attn.weight"] == (768, 2304)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "adaptive"])
def test_loop_is_davda54s_algorithm(adaptive: bool) -> None:
    rho, lr, momentum = 0.05, 0.1, 0.9
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(3, 4), (5,), ()]]
    buffers = [torch.zeros_like(w) for w in weights]
    params = [w.clone().requires_grad_() for w in weights]
    optimizer = LoopSAM(params, torch.optim.SGD, rho=rho, adaptive=adaptive, lr=lr, momentum=momentum)
    for _ in range(4):
        set_gradients(params)
        optimizer.first_step()
        set_gradients(params)
        optimizer.second_step()

        grads = [gradient(w) for w in weights]
        sizes = [w.abs() if adaptive else torch.ones_like(w) for w in weights]
        norm = math.sqrt(sum(float((t * g).square().sum()) for t, g in zip(sizes, grads, strict=True)))
        climbed = [w + rho * t**2 * g / (norm + 1e-12) for w, t, g in zip(weights, sizes, grads, strict=True)]
        buffers = [momentum * b + gradient(c) for b, c in zip(buffers, climbed, strict=True)]
        weights = [w - lr * b for w, b in zip(weights, buffers, strict=True)]
        torch.testing.assert_close([p.detach() for p in params], weights, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("base", UPDATE)
@pytest.mark.parametrize("name", [LISTS, LISTS_ON_HOST, COMPILED])
def test_plain_pytorch_is_the_same_algorithm(name: str, base: str) -> None:
    shapes = [(7, 3), (5,)]
    gradients = measure.Gradients(shapes)
    params, others = ([torch.linspace(-1, 1, math.prod(s)).view(s).requires_grad_() for s in shapes] for _ in range(2))
    # Traced, not compiled: what is compared is the algorithm.
    options = {"compiler": "eager"} if name == COMPILED else {}
    step, loop = (
        implementations.build(name, params, base, **options).step,
        implementations.build(LOOP, others, base).step,
    )
    for _ in range(3):
        gradients.hand_to(params)
        gradients.hand_to(others)
        step()
        loop()
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-6)
    torch.compiler.reset()


def gradient(w: Tensor) -> Tensor:
    """Of sum(w^4 / 4 + sin(w))."""
    return w**3 + w.cos()


def set_gradients(params: list[Tensor]) -> None:
    for p in params:
        p.grad = gradient(p.detach())


@pytest.mark.parametrize("base", UPDATE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_timing_the_operations_changes_nothing(backend: str, base: str) -> None:
    try:
        load(backend, "cpu")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
    shapes = [(7, 3), (5,)]
    gradients = measure.Gradients(shapes)
    params, others = ([torch.linspace(-1, 1, math.prod(s)).view(s).requires_grad_() for s in shapes] for _ in range(2))
    step, timed = implementations.build(backend, params, base)
    base_class, options = implementations.BASES[base]
    plain = FastSAM(others, base_class, rho=implementations.RHO, backend=backend, **options)
    assert timed is not None
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        gradients.hand_to(params)
        gradients.hand_to(others)
        step()
        plain.first_step(zero_grad=False)
        plain.second_step()
        assert all(map(torch.equal, params, others))
        assert set(timed.seconds) == {"grad_norm", "perturb_", UPDATE[base]}
    timed.restore_once_more()
    assert all(map(torch.equal, params, before))
    assert timed.seconds["restore_"] > 0


def test_every_device_has_its_backends() -> None:
    """Triton on GPUs alone: what its interpreter takes says nothing."""
    assert [name for name in implementations.names("cpu") if name in BACKENDS] == ["foreach", "native"]
    assert [name for name in implementations.names("cuda") if name in BACKENDS] == ["foreach", "triton", "native"]


def test_gradients_alternate_between_two_sets_of_addresses() -> None:
    gradients = measure.Gradients([(4,), (2, 2)])
    params = [torch.zeros(4, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    seen = []
    for _ in range(4):
        gradients.hand_to(params)
        seen.append([p.grad.data_ptr() for p in params])
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_rounds_are_interleaved() -> None:
    class Benchmark:
        def __init__(self) -> None:
            self.extra_info: dict[str, float] = {}

        def pedantic(self, target, rounds):
            for _ in range(rounds):
                target()

    visited = []

    def visit(name: str, seconds: float) -> measure.Visit:
        def one() -> measure.Seconds:
            visited.append(name)
            return {STEP: seconds}

        return one

    benchmark = Benchmark()
    rounds = measure.benchmarked({"a": visit("a", 0.25), "b": visit("b", 0.5)}, benchmark, seconds=0.0)
    assert rounds.count == measure.FEWEST_ROUNDS
    assert visited == ["a", "b"] * (2 + measure.FEWEST_ROUNDS)
    assert rounds.measured["b"].parts[STEP] == Timing(500, 500, 500, 500)
    assert benchmark.extra_info == {"a, median ms": 250, "b, median ms": 500}


MILLISECONDS = {LOOP: 200.0, PEER: 210.0, "foreach": 300.0, "native": 40.0, FUSED_BASE: 20.0}


def timing(milliseconds: float) -> Timing:
    return Timing(milliseconds, 0.9 * milliseconds, 1.2 * milliseconds, 0.8 * milliseconds)


def optimizer_part(model: str = "4 x 4096^2", base: str = "SGD", **milliseconds: float) -> OptimizerPart:
    """Every figure made up; a copy of 512 MiB takes 20 ms."""
    measured = {}
    for name, ms in {**MILLISECONDS, **milliseconds}.items():
        parts = {STEP: ms}
        if name in BACKENDS:
            parts |= {
                "grad_norm": 0.1 * ms,
                "perturb_": 0.4 * ms,
                UPDATE[base]: 0.45 * ms,
                "restore_": 0.2 * ms,
                AROUND: 0.05 * ms,
            }
        measured[name] = Measured({part: timing(t) for part, t in parts.items()}, page_faults=1234)
    return OptimizerPart(model, base, 2**26, 4, 15, measured, timing(20.0))


@pytest.fixture
def results() -> Results:
    environment = {"cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "date": "2026-11-21-120000", "commit": "abc1234"}
    return Results(
        1.0,
        environment,
        [optimizer_part(), optimizer_part("2,000 x 256", native=4.0)],
        [methods_part()],
        [training_step()],
    )


def methods_part() -> MethodsPart:
    measured = {name: Measured({STEP: timing(t)}, 0) for name, t in {"SAM()": 20.0, "GSAM()": 30.0}.items()}
    return MethodsPart("ResNet-18", "SGD", 2**24, 62, 9, measured, timing(20.0), {"SAM()": 40.0, "GSAM()": 52.0})


def training_step(**milliseconds: float) -> TrainingStep:
    training = {"SGD": 50.0, LOOP: 120.0, "FastSAM": 105.0, **milliseconds}
    measured = {name: Measured({STEP: timing(t), "optimizer": timing(0.1 * t)}, 0) for name, t in training.items()}
    return TrainingStep("CNN", "SGD", 1000, 10, 7, measured)


def test_figures_follow_from_the_timings() -> None:
    case = optimizer_part()
    assert case.copy_gb_s == pytest.approx(2 * 4 * 2**26 / 0.020 / 1e9)
    assert case.gb_s("native") == pytest.approx(40 * 2**26 / 0.040 / 1e9)
    assert case.gb_s(FUSED_BASE) == pytest.approx(20 * 2**26 / 0.020 / 1e9)
    assert case.share_of_copy("native") == pytest.approx(2.5)
    assert case.times_faster_than_loop("native") == pytest.approx(5)
    assert case.fused_base_steps("native") == pytest.approx(2)
    assert case.operation_share_of_copy("native", "perturb_") == pytest.approx(2.5)
    assert case.around_operations("native") == pytest.approx(2)
    adam = optimizer_part(base="AdamW")
    assert (adam.floor_bytes("native"), adam.floor_bytes(FUSED_BASE)) == (48, 28)


def test_tables(results: Results) -> None:
    text = report.lines(results)
    assert next(line for line in text if line.startswith("native")).split() == [
        *("native", "40.0", "12.0", "32.0", "67.1", "250%", "5.00x", "2.00", "1,234")
    ]
    assert next(line for line in text if line.startswith("GSAM()")).split() == [
        *("GSAM()", "30.0", "9.00", "1.50", "52.0", "1.30", "29.1", "108%")
    ]
    operations = next(line for line in text if line.startswith("4 x 4096^2, SGD") and " native " in line)
    assert operations.split()[5:] == ["4.00", "250%", "16.0", "250%", "8.00", "250%", "18.0", "278%", "2.00"]
    assert next(line for line in text if line.startswith("FastSAM ")).split() == [
        *("FastSAM", "105", "31.5", "2.10", "10.5", "10.0%")
    ]
    assert max(map(len, text)) <= 120


def test_low_precision_is_the_readmes_table() -> None:
    """A fortieth of the weights, and e per weight as the whole has it: what is lost does not depend on their number."""
    scale = math.sqrt(40)
    nearest, stochastic, masters = low_precision.rows(625_000, "reference", rho=low_precision.RHO / scale)
    for (_, length, cosine, projection), expected in (
        (nearest, (0.0304, 0.460, 0.0140)),
        (stochastic, (0.1344, 0.372, 0.0500)),
        (masters, (0.1345, 0.371, 0.0499)),
    ):
        assert (length * scale, cosine, projection * scale) == pytest.approx(expected, rel=0.02)


def verdicts(*cases: OptimizerPart | TrainingStep) -> list[str]:
    results = Results(1.0, {})
    for case in cases:
        (results.optimizer_part if isinstance(case, OptimizerPart) else results.training_step).append(case)
    return report.verdicts(results)


def test_verdicts() -> None:
    missed = verdicts(optimizer_part(native=51.0, **{PEER: 260.0}), training_step(**{HALF_BATCH: 81.0}))
    assert [line.split(" ", 1)[0] for line in missed] == ["NOT", "NOT", "NOT", "NOT"]
    reached = verdicts(optimizer_part(), optimizer_part(base="AdamW"), optimizer_part("GPT-2 small"))
    assert [line.split()[0] for line in reached] == ["reached"] * 4
    assert "5.00x faster than the loop, wanted >= 4.0x" in reached[0]
    steps = {HALF_BATCH: 79.0, "FastSAM, LookSAM()": 62.0, "FastSAM, MomentumSAM()": 50.9, "FastSAM, GSAM()": 150.0}
    assert [line.split()[0] for line in verdicts(training_step(**steps))] == ["reached"] * 3


def test_methods_bytes() -> None:
    """Counted by hand from the operations of each, over SGD with momentum (20 bytes)."""
    norm, climb, update = 4, 16, 20
    expected = {
        "SAM()": norm + climb + update,
        "SAM(p=4)": norm + climb + update,
        # the second ascent: dots of g, w and backup; backup, w and g make w
        "SAM(inner_steps=2)": norm + climb + 12 + 16 + update,
        "ASAM()": norm + 4 + climb + update,  # T in the norm
        "GSAM()": norm + climb + 8 + 4 + update,  # dots of both gradients; both in the update
        "WSAM()": norm + climb + 4 + update,
        # in one step of five: as GSAM, and the direction is read and written; in the others: dots of g and direction
        "LookSAM()": ((norm + climb + 8 + 4 + 8 + update) + 4 * (8 + 4 + update)) / 5,
        # the average in dots and climb; it, and the first gradient, in the update
        "FriendlySAM()": (norm + 4) + (climb + 4) + 4 + 8 + update,
        "MomentumSAM()": norm + climb + update,
        "AMP()": norm + climb + update,
        "AWP()": norm + 4 + climb + update,
        "RandomSAM()": 4 + norm + climb + update,
    }
    assert {name: floor_bytes(method, "SGD") for name, method in METHODS.items()} == expected
    assert floor_bytes(METHODS["GSAM()"], "AdamW") == expected["GSAM()"] + 8
    assert {name: period(method) for name, method in METHODS.items() if period(method) > 1} == {"LookSAM()": 5}


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_the_steps_that_are_timed(name: str) -> None:
    shapes = [(7, 3), (5,)]
    gradients = measure.Gradients(shapes)
    params = [torch.linspace(-1, 1, math.prod(s)).view(s).requires_grad_() for s in shapes]
    steps = MethodSteps(METHODS[name], params, gradients, "SGD", "foreach")
    ticks = iter(range(1000))
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        # One climb and the update, or as many climbs as it takes; each between two ticks.
        assert steps(lambda: next(ticks)) == METHODS[name].ascents + 1
        assert not steps.optimizer.perturbed
        assert not any(map(torch.equal, params, before))


def test_json_names_device_and_versions_and_no_paths(results: Results, tmp_path: Path) -> None:
    path = report.write_json(results, tmp_path)
    assert path.name == "some-cpu_2-threads_2026-11-21-120000_abc1234.json"
    written = json.loads(path.read_text())
    assert written["environment"]["torch"] == "2.13.0"
    assert written["optimizer_part"][0]["implementations"]["native"]["median_ms"] == 40
    assert written["methods"][0]["methods"]["GSAM()"]["bytes_per_parameter"] == 52
    assert written["training_step"][0]["implementations"]["FastSAM"]["base_steps"] == pytest.approx(2.1)
    assert str(tmp_path) not in path.read_text()


def test_plot_is_a_png(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    draw(results, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_flag_everything_is_skipped_with_the_reason() -> None:
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(ROOT / "benchmarks")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "a benchmark: pytest benchmarks/ --benchmark" in run.stdout
    assert "12 skipped" in run.stdout
    assert "passed" not in run.stdout
