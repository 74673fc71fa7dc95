"""The benchmarks' own parts: what stands beside FastSAM, clocks, rounds, records, verdicts, tables, the README."""

# ruff: noqa: E402 - benchmarks/ is a package that is not installed: it has to be put in place before it is imported.

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkout import ROOT, import_benchmarks
from child import run_python
from torch import Tensor

import_benchmarks()

from benchmarks import docs, environment, implementations, low_precision, measure, operations, optimizer_part, report
from benchmarks.device import CudaDevice, Device, OutOfTime, Unavailable, at_most
from benchmarks.host_time import host_time
from benchmarks.implementations import COMPILED, FUSED_BASE, LISTS, LISTS_ON_HOST, LOOP, PEER
from benchmarks.measure import DEVICE, HOST, STEP, Gradients, Timing
from benchmarks.methods import METHODS, MethodSteps, floor_bytes, period
from benchmarks.networks import VIT, WRN, Network
from benchmarks.operations import BACKENDS, UPDATE, OperationClock
from benchmarks.optimizer_part import PartRun, one_visit
from benchmarks.plain import LoopSAM
from benchmarks.plan import CHUNK_SIZES, Part, plan
from benchmarks.records import (
    AROUND,
    CHANGING_LR,
    NEW_GRADIENTS,
    OPTIMIZER,
    STATIC,
    HostTime,
    MethodCosts,
    OptimizerPart,
    Record,
    Results,
    TrainingStep,
)
from benchmarks.session import Session
from benchmarks.shapes import TINY, sizes
from benchmarks.targets import Verdict, verdicts
from benchmarks.training import FASTSAM, HALF_BATCH, IN_A_GRAPH, of_method
from fastsam import FastSAM

# ---- what is measured ----


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
        ("adapters", 64, 851_968),
    ],
)
def test_models_have_their_published_sizes(model: str, tensors: int, parameters: int) -> None:
    assert sizes(model) == {"model": model, "tensors": tensors, "parameters": parameters}


@pytest.mark.parametrize(("network", "missing"), [(WRN, 0), (VIT, 2 * 768)], ids=["WRN", "ViT"])
def test_trained_models_have_their_published_sizes(network: Network, missing: int) -> None:
    """ViT is without the class token and its position."""
    with torch.device("meta"):
        found = sum(p.numel() for p in network.build().parameters())
    assert found == sizes(network.name)["parameters"] - missing


def test_the_most_important_comes_first() -> None:
    gpu = list(plan("cuda"))
    parts = [case for test, case in gpu if test == "test_optimizer_part"]
    assert [test for test, _ in gpu[:3]] == ["test_operations"] * 3
    assert [case.model for case in parts[:5]] == ["ResNet-50", "ViT-B/16", "2,000 x 256", "Llama 1B", "ResNet-18"]
    assert [case.chunk_size for case in parts[5:]].count(None) == len(parts) - 5 - 3 * len(CHUNK_SIZES)
    assert {test for test, _ in gpu} == {test for test, _ in plan("cpu", dry=True)}
    for device, dry in (("cpu", False), ("cuda", False), ("cpu", True)):
        names = [f"{test} {case.id}" for test, case in plan(device, dry=dry, heavyball=True)]
        assert len(set(names)) == len(names)


def test_every_device_has_its_implementations() -> None:
    names, skipped = implementations.names("cpu")
    assert [name for name in names if name in BACKENDS] + [name for name in skipped if name in BACKENDS]
    assert names[0] == LOOP
    assert names[-1] == FUSED_BASE
    assert COMPILED not in names
    assert COMPILED in implementations.names("cpu", compiled=True)[0]
    assert all(name in implementations.DESCRIPTIONS for name in names if name not in BACKENDS)


def gradient(w: Tensor) -> Tensor:
    """Of sum(w^4 / 4 + sin(w))."""
    return w**3 + w.cos()


def set_gradients(params: list[Tensor]) -> None:
    for p in params:
        p.grad = gradient(p.detach())


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
        scales = [w.abs() if adaptive else torch.ones_like(w) for w in weights]
        norm = math.sqrt(sum(float((t * g).square().sum()) for t, g in zip(scales, grads, strict=True)))
        perturbed = [w + rho * t**2 * g / (norm + 1e-12) for w, t, g in zip(weights, scales, grads, strict=True)]
        buffers = [momentum * b + gradient(c) for b, c in zip(buffers, perturbed, strict=True)]
        weights = [w - lr * b for w, b in zip(weights, buffers, strict=True)]
        torch.testing.assert_close([p.detach() for p in params], weights, rtol=1e-12, atol=1e-14)


SHAPES = [(7, 3), (5,)]


def parameters() -> list[Tensor]:
    return [torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_() for shape in SHAPES]


@pytest.mark.parametrize("base", implementations.BASES)
@pytest.mark.parametrize("name", [LISTS, LISTS_ON_HOST, COMPILED, implementations.PEER_IN_LISTS])
def test_the_others_are_the_same_algorithm(name: str, base: str) -> None:
    if name == implementations.PEER_IN_LISTS:
        pytest.importorskip("pytorch_optimizer")
    gradients = Gradients(SHAPES)
    params, others = parameters(), parameters()
    # Traced, not compiled: what is compared is the algorithm.
    options = {"compiler": "eager"} if name == COMPILED else {}
    mine, loop = implementations.build(name, params, base, **options), implementations.build(LOOP, others, base)
    for _ in range(3):
        gradients.hand_to(params)
        gradients.hand_to(others)
        mine.step()
        loop.step()
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-6)
    torch.compiler.reset()


def test_methods_bytes() -> None:
    """Counted by hand from the operations of each, over SGD with momentum (20 bytes)."""
    expected = {"SAM()": 40, "SAM(p=4)": 40, "SAM(inner_steps=2)": 68, "ASAM()": 44, "GSAM()": 52, "WSAM()": 44}
    expected |= {"LookSAM()": 37.6, "FriendlySAM()": 60, "MomentumSAM()": 40, "AMP()": 40, "AWP()": 44}
    expected |= {"RandomSAM()": 44, "StableSAM()": 44, "VaSSO()": 60, "UnifiedSAM()": 40, "SAGM()": 44, "LESAM()": 40}
    expected |= {"ESAM()": 40, "ZSharp()": 48, "GCSAM()": 48}
    assert {name: floor_bytes(name, "SGD") for name in METHODS} == pytest.approx(expected)
    assert floor_bytes("GSAM()", "AdamW") == expected["GSAM()"] + 8
    assert {name: period(name) for name in METHODS if period(name) > 1} == {"LookSAM()": 5}


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_the_steps_that_are_timed(name: str) -> None:
    params = parameters()
    steps = MethodSteps(name, params, Gradients(SHAPES), "SGD", "foreach")
    ticks = iter(range(1000))
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        # The ascents and the update; each between two ticks.
        assert steps(lambda: next(ticks)) == METHODS[name].ascents + 1
        assert not steps.optimizer.perturbed
        assert not any(map(torch.equal, params, before))


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


# ---- how it is measured ----


@pytest.mark.parametrize("base", implementations.BASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_timing_the_operations_changes_nothing(backend: str, base: str) -> None:
    if reason := operations.obstacle(backend, "cpu"):
        pytest.skip(reason)
    gradients, clock = Gradients(SHAPES), OperationClock(Device())
    params, others = parameters(), parameters()
    mine, plain = implementations.build(backend, params, base), implementations.build(backend, others, base)
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        gradients.hand_to(params)
        gradients.hand_to(others)
        with clock.running():
            mine.step()
        plain.step()
        assert all(map(torch.equal, params, others))
        assert set(clock.seconds()) == {"grad_norm", "perturb_", UPDATE}
        assert min(clock.seconds().values()) > 0
    before = [p.detach().clone() for p in params]
    with clock.running():
        mine.optimizer.first_step()
        mine.optimizer.restore()
    assert all(map(torch.equal, params, before))
    assert "restore_" in clock.seconds()


def test_gradients_alternate_between_two_sets_of_addresses() -> None:
    gradients, params = Gradients(SHAPES), parameters()
    seen = []
    for _ in range(4):
        gradients.hand_to(params)
        seen.append([p.grad.data_ptr() for p in params])
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_rounds_are_interleaved() -> None:
    visited = []

    def visit(name: str, seconds: float) -> measure.Visit:
        return lambda: visited.append(name) or {STEP: seconds}

    benchmark = SimpleNamespace(pedantic=lambda target, rounds: [target() for _ in range(rounds)])
    visits = {"a": visit("a", 0.25), "b": visit("b", 0.5)}
    for drive in (None, measure.driven_by(benchmark)):
        visited.clear()
        rounds = measure.interleaved(visits, 0.0, drive)
        assert rounds.count == measure.FEWEST_ROUNDS
        assert visited == ["a", "b"] * (2 + measure.FEWEST_ROUNDS)
        assert rounds.times["b"][STEP] == Timing(500, 500, 500, 500)


class StrictDevice(Device):
    """Asynchronous; fails where a time is read before it is idle, or taken of a step with a warm cache."""

    type, asynchronous, copy_elements = "cpu", True, 2**10

    def __init__(self, memory: float = math.inf) -> None:
        self.memory, self.pending, self.warm, self.asleep = memory, 0, True, False

    def mark(self) -> float:
        self.pending += 1
        return super().mark()

    def seconds(self, start: float, end: float) -> float:
        assert self.pending == 0, "read before the device was idle"
        return super().seconds(start, end)

    def synchronize(self) -> None:
        self.pending, self.asleep = 0, False

    def flush_cache(self) -> None:
        self.warm = False

    def head_start(self, seconds: float) -> None:
        assert not self.warm, "the cache is flushed before the head start, which is to last"
        assert seconds > 0
        self.asleep = True

    def free_bytes(self) -> float:
        return self.memory


@pytest.mark.parametrize("name", [LOOP, "foreach", FUSED_BASE])
def test_times_are_read_of_an_idle_device_and_with_a_cold_cache(name: str) -> None:
    device, params = StrictDevice(), parameters()
    implementation = implementations.build(name, params, "SGD")
    seen = []

    def step() -> None:
        seen.append((device.warm, device.asleep))
        device.warm = True
        implementation.step()

    visit = one_visit(device, implementation._replace(step=step), params, Gradients(SHAPES))
    for _ in range(2):
        seconds = visit()
    operations_of = {"grad_norm", "perturb_", "restore_", UPDATE} if name == "foreach" else set()
    assert set(seconds) == {STEP, HOST, DEVICE} | operations_of
    one = [(False, False), (False, True), *([(False, True)] if operations_of else [])]
    assert seen == one * 2


def small_device() -> Device:
    device = Device()
    device.copy_elements = 2**10
    return device


def test_a_whole_case_on_the_cpu() -> None:
    run = PartRun(small_device(), Part(TINY, "AdamW", "bfloat16"), fewest=2)
    record = run.measure([LOOP, "foreach", "no such"], {"triton": "because"}, 0.0)
    assert list(record.times) == [LOOP, "foreach"]
    assert record.skipped == {"triton": "because", "no such": "ValueError: there is no implementation 'no such'"}
    assert record.rounds == 2
    assert record._moved(record.bytes_per_parameter["foreach"]) == 24 * record.parameters
    assert set(record.operations("foreach")) == {"grad_norm", "perturb_", "restore_", UPDATE}
    assert set(record.times["foreach"]) >= {STEP, AROUND}


def test_one_that_fails_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("no memory\nand more")

    def build(name: str, *args: object, **options: object) -> implementations.Implementation:
        return implementations.Implementation(fail, None) if name == LISTS else real(name, *args, **options)

    real = implementations.build
    monkeypatch.setattr(implementations, "build", build)
    record = PartRun(small_device(), Part(TINY), fewest=2).measure([LISTS, LOOP], {}, 0.0)
    assert list(record.times) == [LOOP]
    assert record.skipped == {LISTS: "OutOfMemoryError: no memory"}


def test_no_more_implementations_at_a_time_than_there_is_memory_for() -> None:
    names = ["a", "b", "c", "d", "e"]
    each = optimizer_part.COPIES * 4 * int(sizes(TINY)["parameters"])
    for fitting, shifts in ((5, [5]), (4, [3, 2]), (2, [2, 2, 1]), (1, [1] * 5)):
        device = StrictDevice((fitting + 0.5) * each / optimizer_part.USABLE)
        assert list(map(len, PartRun(device, Part(TINY))._shifts(names))) == shifts
    with pytest.raises(Unavailable, match="memory"):
        PartRun(StrictDevice(each), Part(TINY))._shifts(names)


@pytest.mark.skipif(bool(operations.obstacle("native", "cpu")), reason="the extension is not compiled")
def test_host_time_without_launches() -> None:
    """Nothing is launched, nothing is changed, and everything is as before afterwards."""
    record = host_time(Device(), TINY, seconds=0.0)
    assert {FUSED_BASE, "native"} <= set(record.times)
    assert set(record.times["native"]) == {STATIC, NEW_GRADIENTS, CHANGING_LR}
    assert record.stubbed
    beside = host_time(Device(), TINY, seconds=0.0, frozen=3)
    assert "2 tensors beside 3 frozen" in beside.name
    assert beside.tensors == record.tensors
    params = parameters()
    Gradients(SHAPES).hand_to(params)
    before = [p.detach().clone() for p in params]
    with operations.stubbed_launches("native"):
        implementations.build("native", params, "SGD").step()
    assert all(map(torch.equal, params, before))
    implementations.build("native", params, "SGD").step()
    assert not any(map(torch.equal, params, before))


def test_a_block_is_interrupted_at_its_limit() -> None:
    with pytest.raises(OutOfTime), at_most(0.05):
        time.sleep(30)
    with at_most(30):
        pass
    time.sleep(0.01)  # and nothing is left behind


class StandIn:
    """What ``CudaDevice`` uses of ``torch.cuda``, in the host's time; it keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str):
        return lambda *_, **__: self.asked.append(name) or self

    def get_device_properties(self, index: object) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=100, total_memory=2**26)

    def elapsed_time(self, end: object) -> float:
        assert self.asked[-1] == "synchronize", "read before the device was idle"
        return 2.0

    def max_memory_allocated(self) -> int:
        return 12345

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.asked.append("on a side stream")
        yield
        self.asked.append("back")

    @contextlib.contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        self.asked.append("capture")
        yield
        self.asked.append("captured")


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, zeros = StandIn(), torch.zeros
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "zeros", lambda *args, device, **options: zeros(*args, **options))
    device = CudaDevice()
    assert device.copy_elements == 2**20
    assert device._cycles_per_second == pytest.approx(10_000_000 / 2e-3)
    cuda.asked.clear()
    start, end = device.mark(), device.mark()
    assert cuda.asked == ["Event", "record"] * 2
    device.synchronize()
    assert device.seconds(start, end) == 2e-3
    cuda.asked.clear()
    assert device.peak_bytes(lambda: cuda.asked.append("step")) == 12345
    assert cuda.asked == ["synchronize", "reset_peak_memory_stats", "step", "synchronize"]
    cuda.asked.clear()
    replay = device.capture(lambda: cuda.asked.append("step"))
    warm_up = ["Stream", "current_stream", "wait_stream", "on a side stream", "step", "step", "step", "back"]
    assert cuda.asked == [*warm_up, "current_stream", "wait_stream", "CUDAGraph", "capture", "step", "captured"]
    cuda.asked.clear()
    replay()
    assert cuda.asked == ["replay"]


# ---- figures, made up ----

CPU = {"cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "date": "2026-11-21-120000", "commit": "abc1234"}
GPU = {**CPU, "gpu": "NVIDIA Some GPU", "driver": "1.2", "triton": "3.6"}
MILLISECONDS = {LOOP: 200.0, PEER: 210.0, LISTS: 60.0, LISTS_ON_HOST: 50.0, "foreach": 100.0, "triton": 20.0}
MILLISECONDS |= {"native": 10.0, FUSED_BASE: 5.0}


def timing(milliseconds: float) -> Timing:
    return Timing(milliseconds, 0.9 * milliseconds, 1.2 * milliseconds, 0.8 * milliseconds)


def part(model: str = "Llama 1B", base: str = "SGD", *, gpu: bool = True, **changed: float) -> OptimizerPart:
    """10^8 parameters; a copy of 4 TB/s; a step's device time is 95% of that from idle to idle."""
    times = {}
    for name, ms in {**MILLISECONDS, **changed}.items():
        clocks = {HOST: timing(0.1), DEVICE: timing(0.095 * ms)} if gpu else {}
        own = {"grad_norm": 0.1, "perturb_": 0.4, UPDATE: 0.5, "restore_": 0.2} if name in BACKENDS else {}
        times[name] = {STEP: timing(ms), **clocks, **{operation: timing(ms * x) for operation, x in own.items()}}
    floor = {name: 20 if name == FUSED_BASE else 40 for name in times}
    return OptimizerPart(
        model=model,
        base=base,
        parameters=10**8,
        tensors=146,
        rounds=7,
        times=times,
        skipped={COMPILED: "because"},
        copy_gb_s=4000.0,
        bytes_per_parameter=floor,
        page_faults={} if gpu else dict.fromkeys(times, 1234),
    )


def training_step(model: str = "WRN-28-10", **changed: float) -> TrainingStep:
    names = {"SGD": 100.0, LOOP: 230.0, FASTSAM: 201.0, IN_A_GRAPH: 200.0, HALF_BATCH: 156.0, **changed}
    times = {name: {STEP: timing(ms), OPTIMIZER: timing(0.1 * ms)} for name, ms in names.items()}
    sized = {"parameters": 1000, "tensors": 10, "rounds": 7, "batch": 128}
    return TrainingStep(model=model, base="SGD", times=times, **sized)


def host(native: float = 0.07, *, copies: float = 1.001, stubbed: bool = False) -> HostTime:
    times = {
        name: {STATIC: timing(ms), NEW_GRADIENTS: timing(ms), CHANGING_LR: timing(ms + 0.004)}
        for name, ms in {FUSED_BASE: 0.15, "native": native, "triton": 0.11}.items()
    }
    extra = {} if stubbed else {"native": copies}
    launches = {} if stubbed else {name: {"kernel": 3} for name in times}
    sized = {"model": "ResNet-50", "parameters": 25_557_032, "tensors": 161}
    return HostTime(**sized, base="SGD", times=times, stubbed=stubbed, launches=launches, extra_copies=extra)


def costs() -> MethodCosts:
    times = {name: {STEP: timing(ms)} for name, ms in {"SAM()": 20.0, "GSAM()": 30.0, "AMP()": 22.0}.items()}
    sized = {"parameters": 2**24, "tensors": 62, "rounds": 9, "copy_gb_s": 26.8435}
    floor = {"SAM()": 40.0, "GSAM()": 52.0, "AMP()": 40.0}
    return MethodCosts(model="ResNet-18", base="SGD", times=times, bytes_per_parameter=floor, **sized)


def results(*records: Record, gpu: bool = True) -> Results:
    return Results(dict(GPU if gpu else CPU), [*records], ["GPT-2 small: there was no time left"])


def test_figures_follow_from_the_timings() -> None:
    one = part()
    assert one.gb_s("native") == pytest.approx(40 * 10**8 / 0.95e-3 / 1e9)
    assert one.share_of_copy("native") == pytest.approx(1 / 0.95)
    assert one.faster("native", LOOP) == pytest.approx(20)
    assert one.best_plain == LISTS_ON_HOST
    assert one.faster("native", one.best_plain) == pytest.approx(5)
    assert one.faster("native", "not measured") is None
    assert one.ratio("native", FUSED_BASE) == pytest.approx(2)
    assert one.operation_share_of_copy("native", "perturb_") == pytest.approx(16e8 / 4e-3 / 4e12)
    assert part(gpu=False).device("native") == part().step("native")
    assert costs().sam_steps("GSAM()") == pytest.approx(1.5)
    assert training_step().base_steps(FASTSAM) == pytest.approx(2.01)


def test_results_come_back_from_json_and_from_lines(tmp_path: Path) -> None:
    records = [part(), costs(), training_step(), host()]
    path = report.write_json(results(*records), tmp_path)
    assert path.name == "nvidia-some-gpu_2026-11-21-120000_abc1234.json"
    assert Results.read(path) == results(*records)
    assert str(tmp_path) not in path.read_text()
    written = json.loads(path.read_text())
    assert written["records"][0]["figures"]["native"]["times_faster_than_loop"] == pytest.approx(20)
    assert environment.file_name(CPU) == "some-cpu_2-threads_2026-11-21-120000_abc1234"

    lines = tmp_path / "measure.jsonl"
    with lines.open("w") as file:
        run = Results(dict(GPU), lines=lambda line: file.write(line + "\n") and None)
        for record in records:
            run.add(record)
        run.leave_out("x: why")
        file.write('{"outcome": {}}\n{"record": {"mod')  # a run that was cut off
    found = Results.read(lines)
    assert (found.environment, found.records, found.not_measured) == (GPU, records, ["x: why"])


def judged(*records: Record, gpu: bool = True) -> dict[str, bool | None]:
    return {verdict.what: verdict.reached for verdict in verdicts(results(*records, gpu=gpu))}


def test_verdicts_on_a_gpu() -> None:
    models = ("ResNet-50", "Llama 1B", "2,000 x 256")
    good = judged(*(part(model, **{LOOP: 400.0}) for model in models), host(), training_step(**{HALF_BATCH: 154.0}))
    mine = {what: reached for what, reached in good.items() if "triton" not in what}
    missing = {what for what, reached in mine.items() if reached is None}
    assert missing == {"native: share of the copy, AdamW, from 86M parameters up"}
    assert {reached for what, reached in mine.items() if what not in missing} == {True}
    slow = {"native": 41.0, "triton": 41.0}
    worse = {FASTSAM: 203.0, IN_A_GRAPH: 203.0}
    bad = judged(*(part(model, **slow) for model in models), host(0.2, copies=1.1), training_step(**worse))
    assert {what for what, reached in bad.items() if reached} == {
        f"ResNet-50, SGD, 161 tensors: {what}"
        for what in ("triton, host time", "native, host time of a changing lr", "triton, host time of a changing lr")
    }
    assert [what for what, reached in bad.items() if reached is None and "AdamW" not in what] == [
        "triton: extra memory, copies of the parameters"
    ]
    assert set(judged().values()) == {None}


def test_verdicts_on_the_cpu() -> None:
    speed = judged(part("2,000 x 256", gpu=False), part("4 x 4096^2", gpu=False, native=60.0), gpu=False)
    assert [what for what, reached in speed.items() if not reached] == [
        "2,000 x 256, SGD: native, fused base steps",
        "4 x 4096^2, SGD: native, faster than the loop",
        "4 x 4096^2, SGD: native, fused base steps",
    ]
    assert judged(part(PEER, gpu=False, **{PEER: 260.0}), gpu=False) == {}
    peer = judged(part("ResNet-50", gpu=False, **{PEER: 260.0}), gpu=False)
    assert peer[f"ResNet-50, SGD: the loop in units of {PEER}"] is False
    assert judged(costs(), gpu=False) == {"ResNet-18, SGD: AMP() in units of SAM()": False}
    training = training_step("CNN", **{HALF_BATCH: 159.0, of_method("LookSAM()"): 124.0})
    assert set(judged(training, gpu=False).values()) == {True}
    host_times = judged(host(0.09, stubbed=True), gpu=False)
    assert list(host_times.values()) == [False, True, True, True, False]
    assert str(Verdict("x", ">= 2x", "1x", False)) == "NOT REACHED  x: 1x, wanted >= 2x"


def test_the_report_has_everything() -> None:
    text = report.lines(results(part(), part(gpu=False), costs(), training_step(), host()))
    cells = [line.split() for line in text]
    row = ["native", "10.0", "3.00", "0.100", "0.950", "0.285", "4,210.5", "105%", "20.00x", "5.00x", "2.00"]
    assert row in cells
    assert ["native", "10.0", "3.00", "8.00", "400.0", "10%", "20.00x", "5.00x", "2.00", "1,234"] in cells
    assert ["GSAM()", "30.0", "9.00", "1.50", "52.0", "1.30", "29.1", "108%"] in cells
    assert ["FastSAM", "201", "60.3", "2.010", "20.1", "10.0%"] in cells
    assert ["native", "70", "(21)", "70", "(21)", "74", "(22)", "3", "1.0010"] in cells
    assert "not measured: compiled lists (because)" in text
    assert "GPT-2 small: there was no time left" in text
    operations_rows = [line for line in cells if line[:4] == ["Llama", "1B,", "SGD", "native"]]
    assert operations_rows[0][4:] == ["1.00", "10%", "4.00", "10%", "2.00", "10%", "5.00", "10%"]


def test_what_must_run_and_did_not_fails_the_case() -> None:
    said: list[str] = []
    session = Session(Device(), results(), said.append, dry=False, seconds=0.0)
    session.add(part(), needed={"native", FUSED_BASE})
    with pytest.raises(pytest.fail.Exception, match="Llama 1B, SGD: compiled lists: because"):
        session.add(part(), needed={COMPILED})
    assert len(session.results.records) == 2, "what was measured stays"
    assert any(line.startswith("native") for line in said)


def test_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    draw(results(part(), part(gpu=False), gpu=False), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


# ---- pytest benchmarks/ ----


def benchmarks(*options: str, status: int = 0, **variables: str) -> str:
    arguments = ["-p", "no:cacheprovider", "-p", "no:xdist", str(ROOT / "benchmarks"), *options]
    program = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    done = run_python(program, *arguments, folder=ROOT, environment=variables)
    assert done.returncode == status, done.stdout
    return done.stdout


def test_without_the_flag_everything_is_skipped_with_the_reason() -> None:
    text = benchmarks("-rs", "--device", "cpu")
    assert "a benchmark: pytest benchmarks/ --benchmark" in text
    assert f"{len(list(plan('cpu')))} skipped" in text
    assert "passed" not in text


def test_findings_are_written_as_they_come_and_what_comes_too_late_is_named(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    options = [
        "--benchmark",
        "--dry",
        "--threads",
        "1",
        "-k",
        "tinyCNN",
        "--lines",
        str(lines),
        "--results",
        str(tmp_path),
    ]
    text = benchmarks(*options, FASTSAM_COMMIT="abc")
    assert [record.name for record in Results.read(lines).records] == ["tiny CNN, SGD, batch 2"]
    assert len(list(tmp_path.glob("*_abc.json"))) == 1
    assert text.index("tiny CNN, SGD, batch 2:") < text.index("FastSAM's benchmarks")
    benchmarks(*options, "--until", str(time.time()))
    assert Results.read(lines).not_measured == ["test_training_step[tinyCNN]: there was no time left"]


# ---- what the README says ----


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    for folder in ("docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def test_this_readme_is_what_the_results_make_it() -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("the tests run without the checkout")
    assert docs.differences(ROOT) == []


def test_the_readme_follows_the_newest_results(checkout: Path) -> None:
    pytest.importorskip("matplotlib")
    assert docs.differences(checkout) == ["README.md's GPU table"]
    docs.write(checkout)
    assert (checkout / "README.md").read_text() == f"before\n{docs.BEGIN}\n{docs.NONE_YET}\n{docs.END}\nafter\n"
    assert docs.differences(checkout) == []
    folder = checkout / "benchmarks" / "results"
    (folder / "some-cpu.json").write_text(json.dumps({"environment": CPU}))
    for gpu, date in (("NVIDIA Some GPU", "2026-11-21"), ("Another (GPU)", "2026-11-20")):
        one = results(part("ResNet-50"), part("ResNet-50", "AdamW", gpu=True))
        one.environment |= {"gpu": gpu, "date": date}
        docs.take_over(report.write_json(one, checkout), folder)
    assert docs.differences(checkout) == ["README.md's GPU table", "docs/gpu.png"]
    docs.write(checkout)
    assert docs.differences(checkout) == []
    text = (checkout / "README.md").read_text()
    assert "[results](benchmarks/results/nvidia-some-gpu_2026-11-21_abc1234.json)" in text
    assert "| ResNet-50, SGD | 200 | 50.0 | 10.0 | 20.00 | 5.00 | 105% |" in text
    assert (checkout / docs.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("gpu", [False, True], ids=["no GPU", "no figures"])
def test_results_without_a_gpu_or_figures_are_not_taken_over(tmp_path: Path, gpu: bool) -> None:
    path = report.write_json(results(*([] if gpu else [part()]), gpu=gpu), tmp_path)
    with pytest.raises(SystemExit, match="no measurements of a GPU"):
        docs.take_over(path, tmp_path)


def test_a_readme_without_markers_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    with pytest.raises(SystemExit, match="has no <!-- GPU table"):
        docs.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "nothing"


def test_an_observer_sees_the_block_alone() -> None:
    """It ends with its block, after an exception, too."""
    params = parameters()
    optimizer = FastSAM(params, lr=0.1, backend="foreach")
    Gradients(SHAPES).hand_to(params)
    seen: list[str] = []

    def observed_step() -> None:
        with operations.backends.observe(lambda name, run: (seen.append(name), run())[1]):
            optimizer.first_step()
            raise KeyError

    with pytest.raises(KeyError):
        observed_step()
    optimizer.restore()
    assert seen == ["grad_norm", "perturb_"]
