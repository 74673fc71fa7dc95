"""benchmarks/gpu_report/: stages, figures, verdicts, what is written. ``make gpu-report DRY=1`` runs all of it."""

# ruff: noqa: E402 - benchmarks/ is a package that is not installed: it has to be put in place before it is imported.

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkout import ROOT, import_benchmarks

import_benchmarks()

from benchmarks import implementations
from benchmarks.gpu_report import __main__ as command
from benchmarks.gpu_report import docs, markdown, measure, optimizer_part, pipeline, plan
from benchmarks.gpu_report.deadline import RAN_OVER, VARIABLE, seconds_left
from benchmarks.gpu_report.device import CpuDevice, CudaDevice, Unavailable
from benchmarks.gpu_report.interruption import OutOfTime, at_most
from benchmarks.gpu_report.models import VisionTransformer, WideResNet
from benchmarks.gpu_report.optimizer_part import Case
from benchmarks.gpu_report.records import (
    COPY,
    DEVICE,
    HOST,
    OptimizerCase,
    Overhead,
    Report,
    StageOutcome,
    TrainingCase,
)
from benchmarks.gpu_report.stages import Stage
from benchmarks.gpu_report.targets import TARGETS
from benchmarks.gpu_report.training_step import FASTSAM, HALF_BATCH
from benchmarks.implementations import COMPILED, FUSED_BASE, LISTS, LISTS_ON_HOST, LOOP
from benchmarks.measure import STEP, Gradients, Timing

# ---- stages ----


def stage(code: str, **options) -> Stage:
    return Stage("a stage", [sys.executable, "-c", code], "stage.log", options.pop("limit", 60.0), **options)


@pytest.mark.parametrize(("code", "status"), [("", "passed"), ("exit(1)", "failed"), (f"exit({RAN_OVER})", "ran over")])
def test_a_stage_has_a_status_a_log_and_a_last_line(tmp_path: Path, code: str, status: str) -> None:
    outcome = stage(f"print('begin'); print('the end'); {code}").run(tmp_path, tmp_path, remaining=60)
    assert outcome.status == status
    assert outcome.detail.endswith("the end")
    assert (tmp_path / "stage.log").read_text().endswith("begin\nthe end\n")


def test_a_stage_that_runs_over_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import pathlib, time; time.sleep(4); pathlib.Path({str(alive)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    outcome = stage(code).run(tmp_path, tmp_path, remaining=1.5)
    assert outcome.status == "ran over"
    assert outcome.seconds < 30
    time.sleep(4)
    assert not alive.exists()


def test_what_a_stage_leaves_behind_does_not_hold_it_up(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    outcome = stage(code).run(tmp_path, tmp_path, remaining=40)
    assert (outcome.status, outcome.seconds < 30) == ("passed", True)


def test_stages_that_cannot_run_say_why(tmp_path: Path) -> None:
    obstacle = stage("", obstacle="there is no such tool").run(tmp_path, tmp_path, remaining=60)
    assert (obstacle.status, obstacle.detail) == ("skipped", "there is no such tool")
    late = stage("").run(tmp_path, tmp_path, remaining=0)
    assert late.status == "ran over"
    absent = Stage("absent", ["no-such-program"], "stage.log", 60.0).run(tmp_path, tmp_path, remaining=60)
    assert absent.status == "failed"
    assert "no-such-program" in absent.detail


def test_a_stage_knows_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = stage(f"import os, time; print(float(os.environ['{VARIABLE}']) - time.time())", limit=40.0).run(
        tmp_path, tmp_path, remaining=1000
    )
    assert 0 < float(outcome.detail) <= 40
    monkeypatch.delenv(VARIABLE, raising=False)
    assert seconds_left() == math.inf


def test_tests_without_time_are_skipped_and_the_status_says_so(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_report.out_of_time", "test_it.py"]
    for end, status, summary in ((0.0, RAN_OVER, "1 skipped"), (time.time() + 1000, 0, "1 passed")):
        environment = {"PYTHONPATH": str(ROOT), "PATH": "", VARIABLE: str(end)}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *options], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == status, run.stdout + run.stderr
        assert summary in run.stdout


def test_a_block_is_interrupted_at_its_limit() -> None:
    with pytest.raises(OutOfTime), at_most(0.05):
        time.sleep(30)
    with at_most(30):
        pass
    time.sleep(0.01)  # and nothing is left behind


def test_tests_that_need_what_is_absent_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pipeline.importlib.util.find_spec
    monkeypatch.setattr(
        pipeline.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else found(name)
    )
    chosen = [str(Path(path).relative_to(pipeline.TESTS)) for path in pipeline._files()]
    assert chosen[: len(pipeline.FIRST_TESTS)] == list(pipeline.FIRST_TESTS)
    assert "test_tensor_table.py" not in chosen
    assert {"test_tensor_table.py", "test_memory_layout.py"} <= pipeline._needing_what_is_absent()


def test_the_pipeline_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(pipeline.shutil, "which", lambda name, path=None: f"/bin/{name}")
    build, tests, *checks, measure = pipeline.stages({"compute_capability": "9.0"}, tmp_path / "m", dry=False)
    assert build.environment == {"FASTSAM_BUILD": "cuda", "FASTSAM_CUDA_ARCHS": "90"}
    assert "native:cuda,triton:cuda" in tests.environment["FASTSAM_REQUIRE_BACKENDS"]
    assert [check.command[2] for check in checks] == ["memcheck", "racecheck", "initcheck"]
    assert "TRITON_INTERPRET" not in measure.environment
    assert measure.environment["PYTHONPATH"].split(":")[1:] == [str(ROOT), "/elsewhere"]
    assert tuple(s.name for s in (build, tests, *checks, measure)) == command.STAGES


# ---- measurements ----


class StrictDevice(CpuDevice):
    """Fails where a time is read before the device is idle, or taken of a step with a warm cache."""

    def __init__(self, memory: int = 2**30) -> None:
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

    def free_bytes(self) -> int:
        return self.memory


@pytest.mark.parametrize("name", [LOOP, "native", FUSED_BASE])
def test_times_are_read_of_an_idle_device_and_with_a_cold_cache(name: str) -> None:
    device, shapes = StrictDevice(), [(7, 3), (5,)]
    params = [torch.randn(shape).requires_grad_() for shape in shapes]
    implementation = implementations.build(name, params, "SGD", device)
    seen = []

    def step() -> None:
        seen.append((device.warm, device.asleep))
        device.warm = True
        implementation.step()

    visit = optimizer_part.one_visit(device, implementation._replace(step=step), params, Gradients(shapes))
    for _ in range(2):
        seconds = visit()
    assert set(seconds) >= {STEP, HOST, DEVICE}
    operations = {"grad_norm", "perturb_", "restore_", "restore_and_sgd_"} if name == "native" else set()
    assert set(seconds) - {STEP, HOST, DEVICE} == operations
    one = [(False, False), (False, True), *([(False, True)] if operations else [])]
    assert seen == one * 2


def test_a_whole_case_on_the_cpu() -> None:
    case = Case(CpuDevice(), "tiny", plan.TINY_SHAPES, "AdamW", "bfloat16", fewest=2)
    record = case.measure([LOOP, "native", "no such backend"], {"triton": "because"}, 0.0)
    assert record.implementations == [LOOP, "native"]
    assert set(record.skipped) == {"triton", "no such backend"}
    assert record.skipped["no such backend"].startswith("ValueError")
    assert record.rounds == 2
    assert record.floor_bytes("native") == 24
    assert set(record.operations("native")) == {"grad_norm", "perturb_", "restore_", "restore_and_adam_"}


class Failing:
    """An implementation whose second step fails."""

    steps = 0

    def __call__(self) -> None:
        self.steps += 1
        if self.steps == 2:
            raise torch.OutOfMemoryError("no memory\nand more")


def test_one_that_fails_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, *args: object, **options: object) -> implementations.Implementation:
        return implementations.Implementation(Failing()) if name == LISTS else real(name, *args, **options)

    real = implementations.build
    monkeypatch.setattr(implementations, "build", build)
    record = Case(CpuDevice(), "tiny", plan.TINY_SHAPES, "SGD", "float32", fewest=2).measure([LISTS, LOOP], {}, 0.0)
    assert record.implementations == [LOOP]
    assert record.skipped == {LISTS: "OutOfMemoryError: no memory"}


def failing_item(measured: OptimizerCase | Exception) -> plan.Item:
    def measure_it(available: float) -> OptimizerCase:
        if isinstance(measured, Exception):
            raise measured
        return measured

    return plan.Item("an item", 0.0, measure_it)


def test_what_must_not_fail_is_reported() -> None:
    record = case()
    assert measure.attempt(failing_item(record), CpuDevice()) == (record, [], False)
    record.skipped["native"] = "OutOfMemoryError: none"
    assert measure.attempt(failing_item(record), CpuDevice()) == (record, ["native: OutOfMemoryError: none"], True)
    assert measure.attempt(failing_item(ValueError("no\nway")), CpuDevice()) == (None, ["ValueError: no"], True)
    assert measure.attempt(failing_item(Unavailable("too small")), CpuDevice()) == (None, ["too small"], False)


def test_no_more_implementations_at_a_time_than_there_is_memory_for() -> None:
    names = ["a", "b", "c", "d", "e"]
    each = optimizer_part.COPIES * 4 * 1000
    for fitting, shifts in ((5, [5]), (4, [3, 2]), (2, [2, 2, 1]), (1, [1] * 5)):
        device = StrictDevice(int((fitting + 0.5) * each / optimizer_part.USABLE))
        assert list(map(len, Case(device, "m", {"w": (1000,)}, "SGD", "float32")._shifts(names))) == shifts
    with pytest.raises(Unavailable, match="memory"):
        Case(StrictDevice(each), "m", {"w": (1000,)}, "SGD", "float32")._shifts(names)


def test_the_most_important_comes_first() -> None:
    labels = [item.label for item in plan.items(CpuDevice(), plan.full()) if "overhead" not in item.label]
    assert labels[:3] == ["ResNet-50, SGD, float32", "Llama 1B, SGD, float32", "2,000 x 256, SGD, float32"]
    assert len(labels) == 4 * len(plan.ORDER) + len(plan.NETWORKS) + len(plan.COMPILED_CASES)


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


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    cuda, zeros = StandIn(), torch.zeros
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "zeros", lambda *args, device, **options: zeros(*args, **options))
    return cuda


def test_what_is_asked_of_cuda(cuda: StandIn) -> None:
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


def test_a_step_is_captured_after_some_on_a_side_stream(cuda: StandIn) -> None:
    device = CudaDevice()
    cuda.asked.clear()
    replay = device.capture(lambda: cuda.asked.append("step"))
    warm_up = ["Stream", "current_stream", "wait_stream", "on a side stream", "step", "step", "step", "back"]
    assert cuda.asked == [*warm_up, "current_stream", "wait_stream", "CUDAGraph", "capture", "step", "captured"]
    cuda.asked.clear()
    replay()
    assert cuda.asked == ["replay"]


@pytest.mark.parametrize(("model", "parameters"), [(WideResNet, 36_479_194), (VisionTransformer, 86_567_656)])
def test_trained_models_have_their_published_sizes(model: type, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in model().parameters()) == parameters


# ---- figures ----

ENVIRONMENT = {"gpu": "NVIDIA Some GPU", "driver": "1.2", "torch": "2.11", "triton": "3.6", "date": "2026-11-21-120000"}
ENVIRONMENT |= {"commit": "abc1234", "compute_capability": "9.0"}
MILLISECONDS = {
    LOOP: 40.0,
    LISTS: 6.0,
    LISTS_ON_HOST: 5.0,
    COMPILED: 2.5,
    "triton": 2.0,
    "native": 1.0,
    FUSED_BASE: 0.5,
}


def timing(milliseconds: float) -> Timing:
    return Timing(milliseconds, 0.9 * milliseconds, 1.1 * milliseconds, 0.8 * milliseconds)


def case(model: str = "Llama 1B", base: str = "SGD", dtype: str = "float32", **changed: float) -> OptimizerCase:
    """10^8 parameters; a copy of 4 GB takes 1 ms of the device's time, a step 95% of its time from idle to idle."""
    times = {COPY: {DEVICE: timing(1.0)}}
    for name, ms in {**MILLISECONDS, **changed}.items():
        times[name] = {STEP: timing(ms), HOST: timing(0.1), DEVICE: timing(0.95 * ms)}
    times["native"] |= {"grad_norm": timing(0.1), "perturb_": timing(0.4)}
    times["native"] |= {"restore_": timing(0.2), implementations.UPDATE[base]: timing(0.5)}
    return OptimizerCase(model, base, dtype, 10**8, 146, 4 * 10**9, 7, times, {"foreach": "because"})


def report(**changed: float) -> Report:
    training = {"SGD alone": 100.0, LOOP: 230.0, FASTSAM: changed.pop("training", 201.0), HALF_BATCH: 156.0}
    host = changed.pop("host", 0.1)
    copies = changed.pop("copies", 1.001)
    models = ("ResNet-50", "Llama 1B", "2,000 x 256")
    records = [
        Overhead("native", "ResNet-50", "SGD", 161, timing(host), {"kernel": 3}, copies, int(copies * 10**8)),
        *(case(model, **changed) for model in models),
        TrainingCase("WRN-28-10", "SGD", 36479194, 128, 7, {name: {STEP: timing(t)} for name, t in training.items()}),
    ]
    stages = [StageOutcome("build", "passed", 12.3, "FASTSAM_BUILD=cuda"), StageOutcome("tests", "failed", 1.0, "a|b")]
    return Report(dict(ENVIRONMENT), stages, records, ["GPT-2 small: there was no time left"])


def test_figures_follow_from_the_timings() -> None:
    one = case()
    assert one.copy_gb_s == pytest.approx(4000)
    assert one.gb_s("native") == pytest.approx(40 * 10**8 / 0.95e-3 / 1e9)
    assert one.share_of_copy("native") == pytest.approx(1 / 0.95)
    assert one.times_faster_than(LOOP, "native") == pytest.approx(40)
    assert one.best_lists == LISTS_ON_HOST
    assert one.times_faster_than(one.best_lists, "native") == pytest.approx(5)
    assert one.times_faster_than("not measured", "native") is None
    assert one.operation_share_of_copy("native", "perturb_") == pytest.approx(1.0)
    half = case(base="AdamW", dtype="bfloat16")
    assert (half.floor_bytes("native"), half.floor_bytes(FUSED_BASE)) == (24, 14)
    assert half.operation_share_of_copy("native", "perturb_") == pytest.approx(0.5)


def test_a_report_comes_back_from_json() -> None:
    before = report()
    after = Report.from_json(json.loads(json.dumps(before.as_json())))
    assert after == before
    assert after.backends == ["native", "triton"]
    assert before.as_json()["records"][1]["figures"]["native"]["times_faster_than_loop"] == pytest.approx(40)


def verdicts(one: Report, backend: str = "native") -> dict[tuple[str, str], bool | None]:
    return {(target.what, target.wanted): target.judge(one, backend).reached for target in TARGETS}


def test_verdicts() -> None:
    good = verdicts(report())
    in_a_graph = ("the same in a CUDA graph", "within 2.02x of SGD's")
    half = ("the same, ascent on half the batch", "within 1.55x of SGD's")
    assert {key: value for key, value in good.items() if value is not True} == {in_a_graph: None, half: False}
    bad = verdicts(report(native=4.1, host=0.12, copies=1.1, training=203.0))
    assert {value for key, value in bad.items() if key != in_a_graph} == {False}
    assert set(verdicts(Report(dict(ENVIRONMENT))).values()) == {None}


def test_the_text_has_everything() -> None:
    text = "\n".join(markdown.lines(report()))
    assert "| build | passed | 12 | FASTSAM_BUILD=cuda |" in text
    assert r"| tests | failed | 1 | a\|b |" in text
    assert "| native | 1.00 (0.200) | 0.100 | 0.950 (0.190) | 4,211 | 105% | 40.00 | 5.00 | 2.50 |" in text
    assert "| FastSAM | 201 (40.2) | 2.010 |" in text
    assert "| native | 100 (20) | 3 | 1.0010 |" in text
    assert "Not measured: foreach (because)." in text
    assert "GPT-2 small: there was no time left" in text
    assert all(name in text for name in markdown.OPERATIONS)


def test_a_record_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "measurements.jsonl"
    lines = [json.dumps({"record": case().as_json()}), json.dumps({"incomplete": "x: why"}), '{"record": {"mod']
    file.write_text("\n".join(lines))
    one = Report(dict(ENVIRONMENT))
    for _ in range(2):
        command._read(one, file)
    assert (one.records, one.incomplete) == ([case()], ["x: why"])


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


def test_without_a_report_the_readme_says_so(checkout: Path) -> None:
    assert docs.differences(checkout) == ["README.md's GPU table"]
    docs.write(checkout)
    assert (checkout / "README.md").read_text() == f"before\n{docs.BEGIN}\n{docs.NONE_YET}\n{docs.END}\nafter\n"
    assert docs.differences(checkout) == []


def test_the_readme_follows_the_newest_report(checkout: Path) -> None:
    pytest.importorskip("matplotlib")
    results = checkout / "benchmarks" / "results"
    (results / "some-cpu.json").write_text(json.dumps({"environment": {"cpu": "Some CPU", "date": "2027-01-01"}}))
    for gpu, date in (("NVIDIA Some GPU", "2026-11-21-120000"), ("Another (GPU)", "2026-11-20-120000")):
        one = report()
        one.environment |= {"gpu": gpu, "date": date}
        (checkout / "report.json").write_text(json.dumps(one.as_json()))
        path = docs.take_over(checkout / "report.json", results)
    assert path.name == "another-gpu.json"
    assert docs.differences(checkout) == ["README.md's GPU table", "docs/gpu.png"]
    docs.write(checkout)
    assert docs.differences(checkout) == []
    text = (checkout / "README.md").read_text()
    assert "[results](benchmarks/results/nvidia-some-gpu.json)" in text
    assert "| ResNet-50, SGD | 40.0 | 5.00 | 1.00 | 40.00 | 5.00 | 105% |" in text
    assert (checkout / docs.PICTURE).read_bytes().startswith(b"\x89PNG")
    results.joinpath("nvidia-some-gpu.json").unlink()
    assert len(docs.differences(checkout)) == 2


@pytest.mark.parametrize("environment", [{"gpu": "none: a dry run on the CPU"}, ENVIRONMENT])
def test_a_report_without_a_gpu_or_figures_is_not_taken_over(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "report.json").write_text(json.dumps(Report(dict(environment)).as_json()))
    with pytest.raises(SystemExit, match="no measurements of a GPU"):
        docs.take_over(tmp_path / "report.json", tmp_path)


def test_a_readme_without_markers_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    with pytest.raises(SystemExit, match="has no <!-- GPU table"):
        docs.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "nothing"
