"""``make gpu-report``: its commands, time limits and stages. ``make gpu-report DRY=1`` rehearses all of it."""

# ruff: noqa: E402 - benchmarks/ is a package that is not installed: it has to be put in place before it is imported.

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT, import_benchmarks

import_benchmarks()

from benchmarks import gpu_report
from benchmarks.gpu_report import Outcome, Stage


def run(tmp_path: Path, code: str, seconds: float = 60.0, stage_seconds: float = 100.0, **options) -> Outcome:
    stage = Stage("measure", tmp_path, stage_seconds)
    return stage.run("a command", [sys.executable, "-c", code], seconds, folder=tmp_path, **options)


@pytest.mark.parametrize(("code", "status"), [("", "passed"), ("exit(1)", "failed"), ("exit(5)", "passed")])
def test_a_command_has_a_status_and_a_last_line_and_is_logged_as_it_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], code: str, status: str
) -> None:
    outcome = run(tmp_path, f"print('begin'); print('the end'); {code}", fine=(0, 5))
    assert outcome.status == status
    assert outcome.detail.endswith("the end")
    assert "begin\nthe end\n" in (tmp_path / "measure.log").read_text()
    assert "   begin\n   the end\n" in capfd.readouterr().out
    assert json.loads((tmp_path / "measure.jsonl").read_text())["outcome"] == outcome._asdict()


def test_a_command_that_runs_over_is_interrupted_and_still_says_what_it_has_found(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"""
import pathlib, time
while True:
    pathlib.Path({str(alive)!r}).write_text(str(time.time()))
    time.sleep(0.05)
"""
    # On a busy machine the limit may come at any line.
    code = f"""
try:
    import subprocess, sys, time
    subprocess.Popen([sys.executable, '-S', '-c', {child!r}])
    time.sleep(60)
except KeyboardInterrupt:
    print('what was found')
"""
    outcome = run(tmp_path, code, seconds=5.0)
    assert outcome.status == "ran over"
    assert outcome.detail == "interrupted after 5 s; what was found"
    assert outcome.seconds < 40
    last = alive.read_text()
    time.sleep(1)
    assert alive.read_text() == last, "what it had started is ended, too"


def test_interrupted_tests_print_their_failures(tmp_path: Path) -> None:
    lines = ["import os, signal", "def test_it(): assert False, 'because'"]
    lines += ["def test_long(): os.kill(os.getpid(), signal.SIGINT)"]
    (tmp_path / "test_it.py").write_text("\n".join(lines))
    stage = Stage("tests", tmp_path, 100.0)
    options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.tests_plugin", "-c", os.devnull, "--rootdir", "."]
    command = [sys.executable, "-m", "pytest", *options, "test_it.py"]
    outcome = stage.run("tests", command, 60.0, {"PYTHONPATH": str(ROOT)}, tmp_path)
    log = (tmp_path / "tests.log").read_text()
    assert log.count("AssertionError: because") >= 2, "once when it failed, once in the summary"
    assert (outcome.status, "1 failed" in outcome.detail) == ("failed", True)


def test_what_a_command_leaves_behind_does_not_hold_it_up(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    outcome = run(tmp_path, code)
    assert (outcome.status, outcome.seconds < 40) == ("passed", True)


def test_a_command_that_cannot_run_says_why(tmp_path: Path) -> None:
    late = run(tmp_path, "", stage_seconds=0.0)
    assert (late.status, late.detail) == ("ran over", "not begun: there was no time left")
    absent = Stage("tests", tmp_path, 100.0).run("absent", ["no-such-program"], folder=tmp_path)
    assert absent.status == "failed"
    assert "no-such-program" in absent.detail


class Recorded(Stage):
    """A stage whose commands are not run; ``failing``: those that fail."""

    def __init__(self, tmp_path: Path, failing: tuple[str, ...] = ()) -> None:
        super().__init__("tests", tmp_path, 360.0)
        self.commands: list[tuple[str, list[str], dict[str, str]]] = []
        self.failing = failing

    def run(self, name, command, seconds=0.0, environment=None, folder=None, fine=(0,)) -> Outcome:
        self.commands.append((name, list(command), dict(environment or {})))
        return self.note(Outcome(name, "failed" if name in self.failing else "passed", 0.0, ""))


def test_what_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(gpu_report, "find_tool", lambda name: f"/bin/{name}")
    stage = Recorded(tmp_path)
    gpu_report.tests(stage, dry=False)
    gpu_report.measure(stage, dry=False)
    assert [name for name, *_ in stage.commands] == [
        *("tests of the hardware", "tests of the contract", "memcheck", "racecheck", "measure"),
    ]
    (_, hardware, environment), (_, contract, _), (_, memcheck, _), *_, (_, measure, measuring) = stage.commands
    assert environment["FASTSAM_REQUIRE_BACKENDS"] == "native:cuda,triton:cuda,foreach:cuda"
    assert environment["FASTSAM_TEST_DEVICES"] == "cuda"
    assert environment["PYTHONPATH"].split(":")[1:] == [str(ROOT), "/elsewhere"]
    assert all(tuple(command[command.index("-m", 3) :][:2]) == ("-m", "gpu") for command in (hardware, contract))
    assert Path(hardware[-1]).exists()
    assert not {*hardware} & {path for path in contract if path.startswith(str(ROOT / "tests"))}
    assert memcheck[:3] == ["/bin/compute-sanitizer", "--tool", "memcheck"]
    assert measure[measure.index("--device") + 1] == "cuda"
    assert "TRITON_INTERPRET" not in measuring
    assert measure[measure.index("-o") + 1] == "minversion=8.0"


def test_without_a_sanitizer_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "find_tool", lambda name: None)
    stage = Recorded(tmp_path)
    gpu_report.describe(stage)
    assert "compute-sanitizer: NOT FOUND" in stage.log.read_text()
    gpu_report.tests(stage, dry=False)
    assert [(one.name, one.status) for one in stage.outcomes[-2:]] == [
        ("memcheck", "skipped"),
        ("racecheck", "skipped"),
    ]


@pytest.mark.parametrize("loads", [True, False], ids=["carried in", "built"])
def test_the_extension_of_the_checkout_is_used_if_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: bool
) -> None:
    monkeypatch.setattr(gpu_report, "WORK", tmp_path)
    monkeypatch.setattr(gpu_report, "LIBRARY", tmp_path / "lib")
    monkeypatch.setenv("FASTSAM_CUDA_ARCHS", "90")
    load = "load the extension of the checkout"
    stage = Recorded(tmp_path, failing=() if loads else (load,))
    gpu_report.build(stage, dry=False)
    expected = [load] if loads else [load, "build cuda 90", "load the new extension"]
    assert [name for name, *_ in stage.commands] == expected
    assert all(outcome.status == "passed" for outcome in stage.outcomes)
    assert (tmp_path / "lib" / "fastsam" / "kernels" / "__init__.py").exists()
    if loads:
        command = [sys.executable, "-c", "import fastsam, fastsam.kernels; print(fastsam.__file__)"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.startswith(str(tmp_path / "lib"))


def test_the_second_stage_builds_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that both stages have; unless the sources or the GPU have changed in between."""
    monkeypatch.setattr(gpu_report, "WORK", tmp_path)
    monkeypatch.setattr(gpu_report, "LIBRARY", tmp_path / "lib")
    monkeypatch.setenv("FASTSAM_CUDA_ARCHS", "90")
    load = "load the extension of the checkout"

    class Building(Recorded):
        def run(self, name, *args, **options) -> Outcome:
            if name.startswith("build"):
                (tmp_path / "lib" / "fastsam" / "_C_cuda.abi3.so").write_text("built")
            return super().run(name, *args, **options)

    def names() -> list[str]:
        stage = Building(tmp_path, failing=(load,))
        gpu_report.build(stage, dry=False)
        return [name for name, *_ in stage.commands]

    assert names() == [load, "build cuda 90", "load the new extension"]
    assert names() == [load, "load the extension of an earlier stage"]
    assert (tmp_path / "lib" / "fastsam" / "_C_cuda.abi3.so").read_text() == "built"
    monkeypatch.setenv("FASTSAM_CUDA_ARCHS", "100")
    assert names() == [load, "build cuda 100", "load the new extension"]


def test_without_a_gpu_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(self, name, *args, **options) -> Outcome:
        commands.append(name)
        return self.note(Outcome(name, "failed", 0.0, "Found no NVIDIA driver on your system"))

    monkeypatch.setattr(gpu_report, "WORK", tmp_path)
    monkeypatch.setattr(Stage, "run", run)
    monkeypatch.setattr(gpu_report.signal, "signal", lambda *args: None)
    assert gpu_report.main(["--out", str(tmp_path / "out")]) == 1
    assert commands == ["find the GPU"] * 2
    assert "Found no NVIDIA driver" in (tmp_path / "out" / "measure.log").read_text()
