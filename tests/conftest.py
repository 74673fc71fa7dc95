"""What every test shares: devices, backends, which of them must be able to run, and which tests run by default."""

import gc
import importlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

# The tests import the modules beside this file by their names; --import-mode=importlib puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite(
    "checks",
    "expected",
    "fuzz_machine",
    "fuzz_surroundings",
    "oracle",
    "problem",
    "scaled_loops",
    "scene",
    "trained",
    "trajectory",
)
importlib.import_module("triton_interpreter").set_up()

import pairs  # noqa: E402
from internals import BACKENDS, BackendUnavailable, load  # noqa: E402

# FASTSAM_TEST_DEVICES: only these, for a machine with a GPU that is there for minutes.
ASKED_FOR = os.environ.get("FASTSAM_TEST_DEVICES", "cpu,cuda").split(",")
DEVICES = tuple(name for name in ("cpu", "cuda") if name in ASKED_FOR and (name == "cpu" or torch.cuda.is_available()))
# Backends that must be able to run: "native", on some device that is here; "native:cuda", on that one.
REQUIRED = frozenset(filter(None, map(str.strip, os.environ.get("FASTSAM_REQUIRE_BACKENDS", "").split(","))))
# Folders of which the default run takes pairs of values instead of every combination: pairs that meet in some test of
# a file, or in every test.
IN_PAIRS = {
    "contract": pairs.of_file,
    "operations": pairs.of_function,
    "properties": pairs.of_file,
    "unit": pairs.of_file,
}


def pytest_addoption(parser):
    group = parser.getgroup("fastsam")
    group.addoption("--thorough", action="store_true", help="run all tests, as make test-all does")
    group.addoption("--sample", type=int, default=0, help="run so many of the tests that only --thorough runs, too")
    group.addoption("--sample-seed", type=int, default=None, help="which of them (default: others every day)")


def pytest_configure(config):
    for entry in sorted(REQUIRED):
        name, _, device = entry.partition(":")
        if name not in BACKENDS:
            raise pytest.UsageError(f"FASTSAM_REQUIRE_BACKENDS: no such backend: {name}")
        if device and device not in DEVICES:
            raise pytest.UsageError(f"FASTSAM_REQUIRE_BACKENDS: {entry} is required, but there is no {device} device")
    if config.option.sample_seed is None:
        config.option.sample_seed = int(time.time() // 86400)


def pytest_report_header(config):
    option = config.option
    return f"--sample {option.sample} --sample-seed {option.sample_seed}" if option.sample else None


def pytest_collection_modifyitems(config, items):
    absent = {item for item in items if "huge" in item.keywords and "huge" not in config.option.markexpr}
    if "cuda" not in DEVICES:
        absent |= {item for item in items if "gpu" in item.keywords}
    # Who names a test gets all its variants.
    if not config.option.thorough and not any("::" in argument for argument in config.args):
        absent |= _left_for_thorough(config.option, [item for item in items if item not in absent])
    if absent:
        config.hook.pytest_deselected(items=[item for item in items if item in absent])
        items[:] = [item for item in items if item not in absent]


def _left_for_thorough(option, items):
    marked = {item for item in items if "thorough" in item.keywords}
    left = set(marked)
    for folder, scope in IN_PAIRS.items():
        mine = [item for item in items if item not in marked and item.path.parent.name == folder]
        left |= set(mine) - pairs.choose(mine, scope)
    in_order = [item for item in items if item in left]
    return left - pairs.sample(in_order, option.sample, option.sample_seed)


def pytest_collection_finish():
    """What was collected lives to the end: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.gpu] if name == "cuda" else []) for name in DEVICES])
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
def operations(backend, device):
    """The backend's module: its operations."""
    return load(backend, device.type)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """In layers this small a second thread only waits, which on a busy machine takes seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def interruptible():
    """Ctrl-C is a KeyboardInterrupt here even where the test run ignores it, as one in the background does."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, previous)


def _unavailable(name, device_type):
    try:
        load(name, device_type)
    except BackendUnavailable as reason:
        return str(reason)
    return ""


def _is_required(name, device_type):
    return f"{name}:{device_type}" in REQUIRED or (name in REQUIRED and all(_unavailable(name, d) for d in DEVICES))
