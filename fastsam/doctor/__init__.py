"""``python -m fastsam doctor``: what is installed, which backends can run here, and whether they compute correctly."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import textwrap
from pathlib import Path
from typing import Any

import torch

import fastsam
from fastsam.backends import BACKENDS, BackendUnavailable, load, native, resolve
from fastsam.doctor.self_check import TOLERANCE, check_backend

WIDTH = 100
_COLUMN = 15


def run(as_json: bool = False) -> int:
    """Prints the report, as text or as JSON; returns 1 if a backend is wrong, else 0."""
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Returns the report as plain data: versions, devices, the extension, a verdict on each backend, auto's choices."""
    devices = _devices()
    logger = logging.getLogger("fastsam")
    disabled, logger.disabled = logger.disabled, True  # the verdicts have the reasons for skipped backends
    try:
        verdicts = [(name, device.type, *_check(name, device)) for device in devices for name in BACKENDS]
        chosen = {device.type: _choice(device) for device in devices}
    finally:
        logger.disabled = disabled
    return {
        "versions": _versions(),
        "devices": {str(device): _describe(device) for device in devices},
        "extension": _extension(),
        "backends": [dict(zip(("name", "device", "verdict", "detail"), row, strict=True)) for row in verdicts],
        "auto": chosen,
        "ok": all(verdict != "wrong" for _, _, verdict, _ in verdicts),
    }


def _print(report: dict[str, Any]) -> None:
    backends = report["backends"]
    for title in ("versions", "devices", "extension"):
        _section(title, list(report[title].items()))
    _section("backends", [(b["name"], f"{b['device']:6}{b['verdict']:13}{b['detail']}") for b in backends])
    _section("auto", [(device_type, f"picks {name}") for device_type, name in report["auto"].items()])
    wrong = [f"{b['name']} on {b['device']}" for b in backends if b["verdict"] == "wrong"]
    print(f"WRONG: {', '.join(wrong)}. Please report this with the lines above." if wrong else "all is well")


def _check(name: str, device: torch.device) -> tuple[str, str]:
    """A verdict (ok, wrong, unavailable) and its explanation."""
    try:
        load(name, device.type)
    except BackendUnavailable as reason:
        return "unavailable", str(reason)
    against = "the paper's formulas and torch.optim" if name == "reference" else "reference"
    try:
        outcome = check_backend(name, device)
    except Exception as error:  # an exception of a broken backend is a result, not the end of the report
        return "wrong", f"raised {type(error).__name__}: {error}"
    if outcome.ok:
        return (
            "ok",
            f"{outcome.steps} steps against {against}: largest error {outcome.error:.1f} eps of {TOLERANCE:.0f}",
        )
    size = "bits differ that must be equal" if outcome.error == float("inf") else f"error {outcome.error:.3g} eps"
    return "wrong", f"{size} against {against}, {TOLERANCE:.0f} allowed: {outcome.where}"


def _choice(device: torch.device) -> str:
    try:
        chosen = resolve("auto", device.type)
    except BackendUnavailable as reason:
        return f"nothing: {reason}"
    return next(name for name in BACKENDS if _same(name, device, chosen))


def _same(name: str, device: torch.device, chosen: object) -> bool:
    try:
        return load(name, device.type) is chosen
    except BackendUnavailable:
        return False


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()) is not None:
        devices.append(torch.device(accelerator.type, 0))
    return devices


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        compute = getattr(found, "gcnArchName", None) if torch.version.hip else f"sm_{found.major}{found.minor}"
        return f"{found.name}, {compute}, {found.total_memory / 2**30:.0f} GiB; {torch.cuda.device_count()} of them"
    return f"{torch.accelerator.device_count()} of them"


def _versions() -> dict[str, str]:
    return {
        "fastsam": f"{fastsam.__version__}, in {Path(fastsam.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.platform(terse=True)}",
        "torch": str(torch.__version__),
        "of torch": f"CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'}",
        "triton": _version_of("triton"),
    }


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> dict[str, str]:
    found = importlib.util.find_spec("fastsam._C")
    if found is None or found.origin is None:
        return {
            "file": "none: the optimizer's part of a step is several times slower than it could be",
            "remedy": "with a C++ compiler, in a checkout: pip install --no-build-isolation --no-deps .",
        }
    file = Path(found.origin)
    rows = {"file": f"{file.name}, {file.stat().st_size / 1024:.0f} KiB, in {file.parent}"}
    try:
        importlib.import_module("fastsam._C")
    except ImportError as error:
        return rows | {"broken": f"cannot be loaded: {error}"}
    kernels = ["cpu", "cuda"] if native.cuda_library().exists() else ["cpu"]
    return rows | {"kernels for": ", ".join(kernels)}


def _section(title: str, rows: list[tuple[str, str]]) -> None:
    """Prints rows of a name and a text, wrapped to the terminal's width; a path stays whole, to be copied."""
    print(title)
    wrap = functools.partial(textwrap.fill, width=WIDTH, break_long_words=False, break_on_hyphens=False)
    for name, text in rows:
        lead = f"  {name:{_COLUMN - 2}}"
        indent = " " * (_COLUMN + (19 if title == "backends" else 0))
        print(wrap(text, initial_indent=lead, subsequent_indent=indent))
    print()
