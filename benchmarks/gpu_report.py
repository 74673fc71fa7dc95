"""``make gpu-report``: builds FastSAM for the GPU at hand and measures or tests it there, with time limits.

python -m benchmarks.gpu_report --out DIR                    both stages, six minutes each
python -m benchmarks.gpu_report --out DIR --stage measure    DIR/measure.log, measure.jsonl, <gpu>_....json, a picture
python -m benchmarks.gpu_report --out DIR --stage tests      DIR/tests.log, tests.jsonl
python -m benchmarks.gpu_report --out DIR --dry              a rehearsal on the CPU

Nothing is installed and nothing is fetched. Findings are printed and written as they come; a command that runs over is
interrupted as by Ctrl-C, so that it still says what it has found.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from benchmarks.environment import first_line, version_of

ROOT = Path(__file__).parents[1]
# Where everything runs, with the package in `lib` as it would be installed: in the checkout itself `fastsam` has no
# `kernels`, and nothing is to be installed.
WORK = ROOT / "build" / "gpu-report"
LIBRARY = WORK / "lib"

MINUTES = 6.0
BUILD_SECONDS, SANITIZER_SECONDS = 150.0, 45.0
# The first import of torch reads gigabytes from a cold disk.
IMPORT_SECONDS = 120.0
# For an interrupted command to say what it has found, and for the summary after the last one.
GRACE, LAST_SECONDS = 20.0, 25.0
# Most of the tests' time goes into Triton's compiler, which runs on one core.
WORKERS = max((os.cpu_count() or 2) - 2, 1)

# First what only hardware can show, then every backend's contract; those that are there.
HARDWARE_TESTS = ("gpu",)
CONTRACT_TESTS = ("operations", "unit/test_triton_kernels.py", "unit/test_triton_numbers.py", "contract")
PACKAGES = ("torch", "triton", "pytest", "pytest-xdist", "pytest-timeout", "pytest-benchmark", "hypothesis", "numpy")
PACKAGES += ("matplotlib", "timm", "transformers", "pytorch_optimizer", "heavyball", "setuptools", "ninja")
TOOLS = {
    "nvcc": "--version",
    "c++": "--version",
    "compute-sanitizer": "--version",
    "nvidia-smi": "-L",
    "git": "--version",
}


class Outcome(NamedTuple):
    """How a command ended: ``passed``, ``failed``, ``ran over`` or ``skipped``; the detail is one line."""

    name: str
    status: str
    seconds: float
    detail: str

    def __str__(self) -> str:
        return f"{self.status:9} {self.name}, {self.seconds:.0f} s: {self.detail}"


class Stage:
    """Runs commands one after another until its time is over.

    Args:
        name: ``measure`` or ``tests``; what its files are called.
        out: the folder for them.
        seconds: for everything together.
    """

    def __init__(self, name: str, out: Path, seconds: float) -> None:
        self.name, self.out = name, out
        self.end = time.time() + seconds
        self.outcomes: list[Outcome] = []
        self.log, self.lines = out / f"{name}.log", out / f"{name}.jsonl"
        for stale in (self.log, self.lines):
            stale.unlink(missing_ok=True)

    def say(self, text: str) -> None:
        """Prints a line and puts it into the log."""
        print(text, flush=True)
        with self.log.open("a") as log:
            log.write(text + "\n")

    def run(
        self,
        name: str,
        command: Sequence[str],
        seconds: float = float("inf"),
        environment: Mapping[str, str] | None = None,
        folder: Path = WORK,
        fine: Sequence[int] = (0,),
    ) -> Outcome:
        """Runs a command, no longer than ``seconds`` and the stage; raises nothing of its own.

        Args:
            name: what it does.
            command: the program and its arguments.
            seconds: after which it is interrupted.
            environment: variables beside those of this process.
            folder: where it runs.
            fine: the exit statuses of success.
        """
        limit = min(seconds, self.end - LAST_SECONDS - time.time())
        if limit <= 0:
            return self.note(Outcome(name, "ran over", 0.0, "not begun: there was no time left"))
        self.say(f"== {name}, {limit:.0f} s at most: {' '.join(command)}")
        start = time.monotonic()
        status, last = self._run(command, limit, {**os.environ, **(environment or {})}, folder)
        taken = time.monotonic() - start
        if status is None:
            return self.note(Outcome(name, "ran over", taken, f"interrupted after {limit:.0f} s; {last}"))
        passed = status in fine
        return self.note(
            Outcome(name, "passed" if passed else "failed", taken, last if passed else f"status {status}: {last}")
        )

    def note(self, outcome: Outcome) -> Outcome:
        """Keeps, prints and writes an outcome."""
        self.outcomes.append(outcome)
        self.say(str(outcome))
        with self.lines.open("a") as lines:
            lines.write(json.dumps({"outcome": outcome._asdict()}) + "\n")
        return outcome

    def _run(
        self, command: Sequence[str], limit: float, environment: Mapping[str, str], folder: Path
    ) -> tuple[int | None, str]:
        """The exit status, None if it had to be interrupted, and its output's last line."""
        last: deque[str] = deque(maxlen=1)
        with self.log.open("a") as log:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                    # Where this process runs in the background of a shell it ignores Ctrl-C, and so would the command.
                    preexec_fn=_heed_interrupts,
                )
            except OSError as error:
                return 127, str(error)
            reader = threading.Thread(target=_read, args=(process, log, last))
            reader.start()
            status: int | None = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(limit)
            finally:
                interrupt(process)
                reader.join()
        return status, last[0] if last else ""


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _read(process: subprocess.Popen[str], log: TextIO, last: deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line)
        log.flush()
        print(f"   {line.rstrip()}", flush=True)
        if line.strip():
            last.append(line.strip("= \n"))


def interrupt(process: subprocess.Popen[str]) -> None:
    """Sends Ctrl-C; after a grace period kills the command and every process that it has left behind."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def describe(stage: Stage) -> None:
    """The machine's versions and tools; what is missing is named."""
    found = {name: version_of(name) for name in PACKAGES}
    stage.say(f"python {sys.version.split()[0]}, " + ", ".join(f"{name} {found[name]}" for name in PACKAGES))
    for tool, option in TOOLS.items():
        path = find_tool(tool)
        stage.say(f"{tool}: {'NOT FOUND' if path is None else f'{path}, {first_line([path, option])}'}")


def finds_gpu(stage: Stage) -> bool:
    """Before anything is built for it."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_properties(0))"
    return stage.run("find the GPU", [sys.executable, "-c", code], IMPORT_SECONDS).status == "passed"


def find_tool(name: str) -> str | None:
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{cuda_home}/bin")


def build(stage: Stage, dry: bool) -> None:
    """Puts the package into ``LIBRARY``: with the extension that is in the checkout if that loads, else a new one.

    Or with that of an earlier stage, if it was built from the same sources.
    """
    shutil.rmtree(LIBRARY, ignore_errors=True)
    shutil.copytree(ROOT / "fastsam", LIBRARY / "fastsam", ignore=shutil.ignore_patterns("__pycache__", "kernels"))
    shutil.copytree(ROOT / "kernels", LIBRARY / "fastsam" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    check = [sys.executable, "-c", f"from fastsam.backends import load; load('native', '{device_type(dry)}')"]

    def loads(which: str) -> bool:
        return stage.run(f"load the {which}", check, IMPORT_SECONDS, importing()).status == "passed"

    if loads("extension of the checkout"):
        return
    stage.outcomes.pop()  # there may be none
    for stale in (LIBRARY / "fastsam").glob("*.so"):
        stale.unlink()
    choice = {"FASTSAM_BUILD": "cpu"} if dry else {"FASTSAM_BUILD": "cuda", **_arch()}
    earlier = WORK / "built" / _digest(*choice.values())
    if earlier.exists():
        shutil.copytree(earlier, LIBRARY / "fastsam", dirs_exist_ok=True)
        if loads("extension of an earlier stage"):
            return
    folders = ["--build-lib", str(LIBRARY), "--build-temp", str(WORK / "objects")]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *folders]
    stage.run(f"build {' '.join(choice.values())}", command, BUILD_SECONDS, choice, ROOT)
    if loads("new extension"):
        earlier.mkdir(parents=True, exist_ok=True)
        for library in (LIBRARY / "fastsam").glob("*.so"):
            shutil.copy2(library, earlier)


def _digest(*choice: str) -> str:
    """Of what an extension is built from."""
    sources = [ROOT / "setup.py", *(path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file())]
    contents = (hashlib.sha256(path.read_bytes()).hexdigest() for path in sources if path.exists())
    return hashlib.sha256(" ".join([*choice, *contents]).encode()).hexdigest()[:16]


def _arch() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = os.environ.get("FASTSAM_CUDA_ARCHS") or first_line(query).replace(".", "")
    return {"FASTSAM_CUDA_ARCHS": found} if found else {}


def measure(stage: Stage, dry: bool) -> None:
    """Everything of the plan (plan.py), the most important first."""
    until = stage.end - LAST_SECONDS - GRACE
    command = [*pytest(), str(ROOT / "benchmarks"), "--benchmark", "--device", device_type(dry), "--until", str(until)]
    command += [
        "--lines",
        str(stage.lines),
        "--results",
        str(stage.out),
        "--plot",
        str(stage.out / "optimizer_part.png"),
    ]
    # Several ranks are measured on CPUs alone.
    command += ["--dry", "--threads", "1", "-k", "not rank_costs"] if dry else []
    stage.run("measure", command, environment=importing(dry))


def tests(stage: Stage, dry: bool) -> None:
    """What only hardware shows, the contract, the checkers."""
    device = device_type(dry)
    required = ",".join(f"{backend}:{device}" for backend in ("native", "triton", "foreach"))
    # On the GPU alone: to collect tests for the CPU, too, would take twice the time.
    environment = {"FASTSAM_REQUIRE_BACKENDS": required, "FASTSAM_TEST_DEVICES": device, **importing(dry)}
    workers = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") is not None and not dry else []
    options = [*pytest(), "-p", "benchmarks.tests_plugin", "--maxfail=60", *workers]
    hardware = [*options, "-m", "gpu", *(["--collect-only"] if dry else []), *there_are(HARDWARE_TESTS)]
    stage.run("tests of the hardware", hardware, 150.0, environment, fine=(0, 5) if dry else (0,))
    only = ["-m", "not gpu", "--rehearse", "20"] if dry else ["-m", "gpu"]
    only += ["--ignore-glob=*/test_cuda_*.py"]  # the CUDA kernels on the CPU
    contract = there_are(CONTRACT_TESTS)[: 1 if dry else None]
    stage.run("tests of the contract", [*options, *only, *contract], 150.0, environment)
    steps = [sys.executable, "-m", "benchmarks.awkward_steps", device, "native"]
    if dry:
        stage.run("the steps that checkers watch, unwatched", steps, 3 * SANITIZER_SECONDS, environment)
        return
    sanitizer = find_tool("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            stage.note(Outcome(tool, "skipped", 0.0, "there is no compute-sanitizer"))
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "application-only", *steps]
        # Without the caching allocator, so that an access past the end of an allocation is detected.
        stage.run(tool, command, SANITIZER_SECONDS, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **environment})


def pytest() -> list[str]:
    """For tests that are not installed, by whatever pytest is there."""
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-o", "minversion=8.0"]
    return [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", "-q", "--no-header", "--tb=short"]


def there_are(names: Sequence[str]) -> list[str]:
    return [str(path) for name in names if (path := ROOT / "tests" / name).exists()]


def device_type(dry: bool) -> str:
    return "cpu" if dry else "cuda"


def importing(dry: bool = False) -> dict[str, str]:
    """What was built comes before the checkout, which has the benchmarks."""
    paths = [str(LIBRARY), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    rehearsing = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else {}
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **rehearsing}


STAGES = {"measure": measure, "tests": tests}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder for what is found")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="(default: both)")
    parser.add_argument("--dry", action="store_true", help="a rehearsal on the CPU, tiny")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for each stage (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    # A shell may have had it ignored, and this process's children with it. An exception ends the command that runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out: Path = chosen.out.resolve()
    for folder in (out, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for name in chosen.stage:
        stage = Stage(name, out, 60 * chosen.minutes)
        describe(stage)
        if chosen.dry or finds_gpu(stage):
            if name == chosen.stage[0]:
                build(stage, chosen.dry)
            STAGES[name](stage, chosen.dry)
        outcomes += stage.outcomes
    print(*outcomes, f"written: {', '.join(sorted(path.name for path in out.iterdir()))} in {chosen.out}", sep="\n")
    return 0 if all(outcome.status in ("passed", "skipped") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
