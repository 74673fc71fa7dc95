"""A pytest plugin for the report of a GPU: failures are printed when they happen; a rehearsal takes a sample."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, metavar="N", help="Run about N of the tests, spread evenly.")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (size := config.getoption("sample")) is not None:
        chosen = [item for item in items if "slow" not in item.keywords]
        items[:] = chosen[:: max(len(chosen) // size, 1)]


class AtOnce:
    """On the process that reports, whatever process has run the test."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            reporter = self._plugins.getplugin("terminalreporter")
            reporter.write_line(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(AtOnce(config))
