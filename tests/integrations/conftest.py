"""Runs only when named (make test-integrations): it needs the clients' libraries. Prints the table of clients."""

import logging
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("setting")
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"ACCELERATE_USE_CPU": "true", "NO_ALBUMENTATIONS_UPDATE": "1"}
torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="lightning")
for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


def _is_named(config):
    return any("integrations" in argument for argument in config.args)


def pytest_configure(config):
    # Also in the process that only collects the workers' results: it imports the modules of warnings.
    if _is_named(config):
        from setting import define_torchvision_operators

        define_torchvision_operators()


def pytest_ignore_collect(config):
    return None if _is_named(config) else True


@pytest.fixture
def table(record_property):
    from setting import Table

    return Table(record_property)


def pytest_terminal_summary(terminalreporter):
    reports = [r for each in terminalreporter.stats.values() for r in each if hasattr(r, "user_properties")]
    rows = {row for report in reports for name, row in report.user_properties if name == "client"}
    if not rows:
        return
    header = ("client", "mode", "works", "difference")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
    terminalreporter.section("clients against SAM written by hand")
    for row in [header, *sorted(rows, key=lambda row: (row[0].lower(), row[1]))]:
        terminalreporter.write_line("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]))
