"""The stages of a report: build, tests, checkers, measurements. What cannot run here says why."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.stages import Stage

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"

# Where everything runs, with the package in `lib`, as it would be installed. In the checkout itself `fastsam` has no
# `kernels`, and nothing is to be installed.
WORK = ROOT / "build" / "gpu-report"
LIBRARY = WORK / "lib"

CHECKERS = ("memcheck", "racecheck", "initcheck")

# What has not run on this kind of device before comes first.
FIRST_TESTS = ("test_triton_kernels.py", "test_backends.py", "properties/test_oracle.py", "contract/test_parity.py")
# A dry run takes a few tests of every backend.
DRY_TESTS = "test_groups_climb_each_their_way or test_restore_touches_only_who_climbed"
OPTIONAL_MODULES = ("hypothesis", "sklearn", "matplotlib", "tqdm")
TEST_PROCESSES = 4


def stages(environment: Mapping[str, Any], measurements: Path, *, dry: bool) -> list[Stage]:
    """All of them, in order.

    Args:
        environment: what ``describe`` has found.
        measurements: the file that the last stage writes.
        dry: a part of everything, on the CPU.
    """
    return [_build(environment, dry), _tests(dry), *_checks(dry), _measure(measurements, dry)]


def _build(environment: Mapping[str, Any], dry: bool) -> Stage:
    choice = {"FASTSAM_BUILD": "cpu"}
    if not dry:
        arch = str(environment["compute_capability"]).replace(".", "")
        choice = {"FASTSAM_BUILD": "cuda", "FASTSAM_CUDA_ARCHS": arch}
    built = f"FASTSAM_BUILD={' '.join(choice.values())}"
    command = [sys.executable, "setup.py", "build", "--build-lib", str(LIBRARY)]
    return Stage("build", command, "build.log", 110.0, choice, folder=ROOT, describe=lambda lines: built)


def _tests(dry: bool) -> Stage:
    device = "cpu" if dry else "cuda"
    required = ",".join(f"{backend}:{device}" for backend in ("native", "triton", "foreach"))
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    options += ["-p", "benchmarks.gpu_report.out_of_time", "-q", "--no-header", "--tb=short", "-rs", "--maxfail=50"]
    if importlib.util.find_spec("xdist") is not None and not dry:
        options += ["-n", str(TEST_PROCESSES)]
    chosen = ["-m", "not gpu", "-k", DRY_TESTS, str(TESTS / "test_backends.py")] if dry else ["-m", "gpu", *_files()]
    left_out = [] if dry else sorted(_needing_what_is_absent())

    def describe(lines: Sequence[str]) -> str:
        summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error|skipped)", line)), "")
        absent = f"; without {', '.join(left_out)}, for want of what they import" if left_out else ""
        return summary.strip("= ") + absent

    return Stage(
        "tests",
        [sys.executable, "-m", "pytest", *options, *chosen],
        "tests.log",
        110.0,
        {"FASTSAM_REQUIRE_BACKENDS": required, **_importing()},
        describe=describe,
    )


def _files() -> list[str]:
    found = {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")} - _needing_what_is_absent()
    ordered = [*(name for name in FIRST_TESTS if name in found), *sorted(found.difference(FIRST_TESTS))]
    return [str(TESTS / name) for name in ordered]


def _needing_what_is_absent() -> set[str]:
    """Test modules that import what is not installed."""
    absent = [name for name in OPTIONAL_MODULES if importlib.util.find_spec(name) is None]
    if not absent:
        return set()
    imports = re.compile(rf"^(from|import) ({'|'.join(absent)})\b", re.MULTILINE)
    return {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py") if imports.search(path.read_text())}


def _checks(dry: bool) -> list[Stage]:
    """compute-sanitizer over a short run, every allocation by itself, so that an access behind one is seen."""
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{cuda_home}/bin")
    run = [sys.executable, "-m", "benchmarks.gpu_report.short_run"]
    if dry:
        # The run itself, which nobody watches.
        stage = Stage("memcheck", [*run, "cpu", "native"], "sanitizer.log", 60.0, _importing())
        reason = "a dry run has no compute-sanitizer: memcheck was its short run alone"
        return [stage, *(Stage(name, [], "sanitizer.log", 0.0, obstacle=reason) for name in CHECKERS[1:])]
    if program is None:
        return [Stage(name, [], "sanitizer.log", 0.0, obstacle="there is no compute-sanitizer") for name in CHECKERS]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **_importing()}
    options = ["--error-exitcode", "1", "--target-processes", "application-only"]
    return [
        Stage(
            name,
            [program, "--tool", name, *options, *run, "cuda", "native", "triton"],
            "sanitizer.log",
            45.0,
            environment,
        )
        for name in CHECKERS
    ]


def _measure(measurements: Path, dry: bool) -> Stage:
    command = [sys.executable, "-m", "benchmarks.gpu_report.measure", str(measurements), *(["--dry"] if dry else [])]
    environment = {**_importing(), **({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else {})}
    return Stage("measure", command, "measure.log", 330.0, environment, shown=True, describe=_count_of_items)


def _count_of_items(lines: Sequence[str]) -> str:
    return f"{sum(' s  ' in line for line in lines)} items"


def _importing() -> dict[str, str]:
    """What was built comes before the checkout, which has the benchmarks."""
    paths = [str(LIBRARY), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
