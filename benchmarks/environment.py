"""Where and of what a measurement was made: processor, GPU, versions, date, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def environment(device_type: str = "cpu") -> dict[str, object]:
    """What every report begins with; where a GPU is measured, the GPU as well."""
    return {
        **(_gpu() if device_type == "cuda" else {}),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "date": datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S"),
        # A machine without the repository can be told which commit it measures.
        "commit": os.environ.get("FASTSAM_COMMIT")
        or first_line(["git", "describe", "--always", "--dirty=-modified", "--exclude=*"])
        or "unknown",
        "load": round(os.getloadavg()[0], 1),
    }


def file_name(where: dict[str, object]) -> str:
    """What a file of results from there is called, without its ending."""
    device = "-".join(re.findall("[a-z0-9]+", str(where.get("gpu", where["cpu"])).lower()))
    threads = "" if "gpu" in where else f"_{where['threads']}-threads"
    return f"{device}{threads}_{where['date']}_{where['commit']}"


def version_of(distribution: str) -> str:
    """The version that is installed, if any."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def first_line(command: Sequence[str]) -> str:
    """What a command prints first; an empty text if it cannot run or fails."""
    try:
        run = subprocess.run(command, cwd=FOLDER, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.partition("\n")[0].strip()


def _gpu() -> dict[str, object]:
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory_gib": round(found.total_memory / 2**30),
        "multiprocessors": found.multi_processor_count,
        "l2_mib": round(getattr(found, "L2_cache_size", 0) / 2**20),
        "driver": first_line(query) or "unknown",
        "cuda": torch.version.cuda,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
