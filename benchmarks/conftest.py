"""pytest's side of the benchmarks: the options, the skips, and the report at the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.environment import environment
from benchmarks.measure import settle_allocator
from benchmarks.results import Results

FOLDER = Path(__file__).parent
RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("FastSAM's benchmarks")
    group.addoption("--benchmark", action="store_true", help="Measure; without it these files are skipped.")
    group.addoption("--threads", type=int, default=2, help="torch.set_num_threads (default: 2).")
    group.addoption("--seconds", type=float, default=8.0, help="How long to measure each case (default: 8).")
    group.addoption("--plot", metavar="FILE", type=Path, help="Draw the optimizer part of a step into a PNG.")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install 'fastsam-optim[bench]'")
    torch.set_num_threads(config.getoption("threads"))
    settle_allocator()
    # pytest-benchmark's own table would list whole rounds, of which nobody asks.
    config.option.benchmark_quiet = True
    config.stash[RESULTS] = Results(config.getoption("seconds"), environment())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if FOLDER in item.path.parents]
    if not config.getoption("benchmark"):
        for item in mine:
            item.add_marker(pytest.mark.skip(reason="a benchmark: pytest benchmarks/ --benchmark"))
    elif config.pluginmanager.hasplugin("timeout"):
        for item in mine:
            item.add_marker(pytest.mark.timeout(0))  # on a busy machine slow, not wrong


@pytest.fixture
def results(pytestconfig: pytest.Config) -> Iterator[Results]:
    yield pytestconfig.stash[RESULTS]
    gc.collect()  # the next case needs the memory


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(RESULTS, None)
    if results is None or not (results.optimizer_part or results.methods or results.training_step):
        return
    terminalreporter.section("FastSAM's benchmarks")
    for line in report.lines(results):
        terminalreporter.write_line(line)
    written = report.write_json(results, FOLDER / "results")
    terminalreporter.write_line(f"written: {written.relative_to(FOLDER.parent)}")
    if (plot := config.getoption("plot")) is not None and results.optimizer_part:
        from benchmarks.plot import draw

        draw(results, plot)
        terminalreporter.write_line(f"drawn: {plot}")
