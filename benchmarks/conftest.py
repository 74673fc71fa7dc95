"""pytest's side of the benchmarks: options, the plan's cases and their order, skips, the report at the end."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.device import Unavailable, default_type, reason_of
from benchmarks.environment import environment
from benchmarks.measure import settle_allocator
from benchmarks.plan import plan
from benchmarks.records import Results
from benchmarks.session import SECONDS, Session, device_of

FOLDER = Path(__file__).parent
SESSION = pytest.StashKey[Session]()
# No case is begun in the last seconds of a run.
LAST_SECONDS = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("FastSAM's benchmarks")
    group.addoption("--benchmark", action="store_true", help="Measure; without it these files are skipped.")
    group.addoption("--device", choices=["cpu", "cuda"], help="What to measure (default: cuda if there is one).")
    group.addoption("--dry", action="store_true", help="A rehearsal: tiny cases, no time.")
    group.addoption("--threads", type=int, default=2, help="torch.set_num_threads (default: 2).")
    group.addoption("--seconds", type=float, help=f"How long to measure each case (default: {SECONDS}).")
    group.addoption("--plot", metavar="FILE", type=Path, help="Draw the optimizer part of a step into a PNG.")
    results = FOLDER / "results"
    group.addoption("--results", metavar="FOLDER", type=Path, default=results, help="Where the JSON file goes.")
    group.addoption("--lines", metavar="FILE", type=Path, help="Findings as lines of JSON, written as they come.")
    group.addoption("--until", type=float, default=float("inf"), help="Seconds since the epoch: begin nothing later.")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark"):
        return
    if config.pluginmanager.hasplugin("benchmark"):
        # pytest-benchmark's own table would list whole rounds, of which nobody asks.
        config.option.benchmark_quiet = True
    else:
        config.pluginmanager.register(_PlainRounds())
    torch.set_num_threads(config.getoption("threads"))
    torch.backends.cudnn.benchmark = True
    settle_allocator()
    dry, kind = config.getoption("dry"), _device_type(config)
    try:
        device = device_of(kind, dry=dry)
    except Unavailable as reason:
        raise pytest.UsageError(str(reason)) from None
    seconds = config.getoption("seconds")
    if seconds is None:
        seconds = 0.0 if dry else SECONDS[kind]
    results = Results(environment(kind), lines=_writer(config.getoption("lines")))
    config.stash[SESSION] = Session(device, results, lambda line: _say(config, line), dry, seconds)


class _PlainRounds:
    """In the place of pytest-benchmark, where it is not installed."""

    @pytest.fixture
    def benchmark(self) -> Any:
        return self

    def pedantic(self, one_round: Callable[[], Any], rounds: int) -> None:
        for _ in range(rounds):
            one_round()


def _device_type(config: pytest.Config) -> str:
    return config.getoption("device") or ("cpu" if config.getoption("dry") else default_type())


def _writer(path: Path | None) -> Any:
    if path is None:
        return None
    file = path.open("a", buffering=1)
    return lambda line: file.write(line + "\n")


def _say(config: pytest.Config, line: str) -> None:
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.pluginmanager.getplugin("terminalreporter").write_line(line)


def _cases(config: pytest.Config) -> list[tuple[str, Any]]:
    heavyball = importlib.util.find_spec("heavyball") is not None
    return list(plan(_device_type(config), dry=config.getoption("dry"), heavyball=heavyball))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = [case for test, case in _cases(metafunc.config) if test == metafunc.function.__name__]
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {f"{test}[{case.id}]": position for position, (test, case) in enumerate(_cases(config))}
    mine = [item for item in items if FOLDER in item.path.parents]
    # What the plan has no case of is no test here.
    chosen = sorted((item for item in mine if item.name in order), key=lambda item: order[item.name])
    items[:] = [*(item for item in items if item not in mine), *chosen]
    if not config.getoption("benchmark"):
        for item in chosen:
            item.add_marker(pytest.mark.skip(reason="a benchmark: pytest benchmarks/ --benchmark"))
    elif config.pluginmanager.hasplugin("timeout"):
        for item in chosen:
            item.add_marker(pytest.mark.timeout(0))  # on a busy machine slow, not wrong


@pytest.fixture
def session(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[Session]:
    """The run; a case that comes too late is left out."""
    found = pytestconfig.stash[SESSION]
    if time.time() + LAST_SECONDS > pytestconfig.getoption("until"):
        found.results.leave_out(f"{request.node.name}: there was no time left")
        pytest.skip("there was no time left")
    yield found
    gc.collect()  # the next case needs the memory
    found.device.release_memory()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """Records how each case ends; one that cannot be measured here is skipped, not failed."""
    session = pyfuncitem.config.stash.get(SESSION, None)
    try:
        return (yield)
    except BaseException as error:
        if session is not None:
            session.results.leave_out(f"{pyfuncitem.name}: {reason_of(error)}")
        if isinstance(error, Unavailable):
            pytest.skip(str(error))
        raise


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session is None or not session.results.records:
        return
    terminalreporter.section("FastSAM's benchmarks")
    for line in report.lines(session.results):
        terminalreporter.write_line(line)
    path = report.write_json(session.results, config.getoption("results"))
    terminalreporter.write_line(f"written: {path}")
    plot = config.getoption("plot")
    if plot is not None and importlib.util.find_spec("matplotlib") is not None:
        from benchmarks.plot import draw

        draw(session.results, plot)
        terminalreporter.write_line(f"drawn: {plot}")
