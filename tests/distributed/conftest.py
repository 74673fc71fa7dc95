"""Two ranks for all tests of this folder, four for those of the thorough tier; each process of pytest has its own."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The ranks' processes import the modules of the tests, too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path[:2]]))

from rank_pool import RankPool

ALL_TESTS = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)  # before any is left out
def pytest_collection_modifyitems(config, items):
    mine = [item for item in items if item.path.parent == Path(__file__).parent]
    config.stash[ALL_TESTS] = {f"{item.path.name}::{item.name}" for item in mine}


@pytest.fixture
def all_tests(pytestconfig):
    """The names of the tests of this folder that were collected, those of the thorough tier among them."""
    return pytestconfig.stash[ALL_TESTS]


@pytest.fixture(scope="session")
def pools():
    made = {}
    yield lambda world: made.setdefault(world, RankPool(world))
    for pool in made.values():
        pool.stop()


@pytest.fixture
def ranks(pools):
    """Runs a function on two ranks."""
    return pools(2).run


@pytest.fixture
def four_ranks(pools):
    """Runs a function on four ranks."""
    return pools(4).run
