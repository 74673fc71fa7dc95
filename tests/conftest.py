"""What every test shares: the devices, the backends, and which of them must be able to run."""

import gc
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

from fastsam.backends import BACKENDS, Backend, BackendUnavailable, Request, load

# The test modules import checks.py and oracle.py from this folder, which --import-mode=importlib leaves out.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("checks", "oracle", "scene")
importlib.import_module("triton_interpreter").set_up()

# Backends that must be able to run: "native", on some device that is here; "native:cuda", on that one.
REQUIRED = frozenset(filter(None, map(str.strip, os.environ.get("FASTSAM_REQUIRE_BACKENDS", "").split(","))))


def pytest_configure():
    if unknown := {entry.partition(":")[0] for entry in REQUIRED} - set(BACKENDS):
        raise pytest.UsageError(f"FASTSAM_REQUIRE_BACKENDS: no such backend: {', '.join(sorted(unknown))}")


def pytest_collection_modifyitems(config, items):
    if "huge" not in config.option.markexpr:
        items[:] = [item for item in items if "huge" not in item.keywords]


def pytest_collection_finish():
    """What was collected lives to the end: the collector of garbage need not look at it ever again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    """A ``torch.device`` that is here."""
    return torch.device(request.param)


@pytest.fixture
def runnable(device):
    """Gives a backend's name back if it can run on ``device``; else skips the test, or fails it if that is required."""

    def name_of(name):
        if reason := _unavailable(name, device.type):
            if _is_required(name, device.type):
                pytest.fail(f"{name} is in FASTSAM_REQUIRE_BACKENDS but cannot run: {reason}")
            pytest.skip(reason)
        return name

    return name_of


@pytest.fixture(params=BACKENDS)
def backend(request, runnable):
    """The name of a backend that can run on ``device``."""
    return runnable(request.param)


@pytest.fixture
def operations(backend, device) -> Backend:
    """The backend's module: the five operations."""
    return load(backend, Request(device.type))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _unavailable(name, device_type):
    try:
        load(name, Request(device_type))
    except BackendUnavailable as reason:
        return str(reason)
    return ""


def _is_required(name, device_type):
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return f"{name}:{device_type}" in REQUIRED or (name in REQUIRED and all(_unavailable(name, d) for d in here))
