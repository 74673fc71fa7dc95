"""Random programs on every backend: whatever is done in whatever order, steps are the oracle's and memory is let alone;
whatever surrounds an optimizer, it trains as one that nothing surrounds.

In the suite always the same ones, more of them with --thorough; `make fuzz` draws new ones for as long as it is told.
"""

import os
import random
import time

import fuzz_lives
import fuzz_ranks
import fuzz_surroundings
import pytest
from fuzz_machine import run
from fuzz_programs import programs
from hypothesis import HealthCheck, given, seed, settings
from internals import BACKENDS

MINUTES = float(os.environ.get("FASTSAM_FUZZ_MINUTES", "0"))
"""For all backends together; 0: the suite's fixed programs."""

QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
# So many programs by default, and thoroughly; in Triton's interpreter each takes longer.
COUNTS = {"reference": (20, 480), "foreach": (20, 480), "native": (50, 1020), "triton": (2, 20)}
# Of these, what surrounds an optimizer (fuzz_lives.py).
SURROUNDINGS = {"reference": (7, 160), "foreach": (7, 160), "native": (15, 340), "triton": (1, 10)}
ROUND = settings(QUIET, max_examples=50)


def search_programs(chosen, backend, operations):
    """Carries out random programs until one fails; then prints the smallest that does."""

    @chosen
    @given(programs())
    def carry_out(program):
        with pytest.MonkeyPatch.context() as patch:
            if hasattr(operations, "CHUNK_SIZE"):
                patch.setattr(operations, "CHUNK_SIZE", program.chunk_size)
            run(backend, program)

    return carry_out


def search_surroundings(chosen, backend, operations):
    """The same for what surrounds an optimizer."""

    @chosen
    @given(fuzz_lives.lives())
    def carry_out(life):
        fuzz_surroundings.run(backend, life)

    return carry_out


SEARCHES = {"programs": search_programs, "surroundings": search_surroundings}


@pytest.mark.timeout(60 * MINUTES + 600)
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("what", SEARCHES)
def test_programs(backend, device, operations, request, what):
    search, thorough = SEARCHES[what], request.config.option.thorough
    if MINUTES == 0:
        others = SURROUNDINGS[backend][thorough]
        count = others if what == "surroundings" else COUNTS[backend][thorough] - others
        search(settings(QUIET, max_examples=count, derandomize=True), backend, operations)()
        return
    end, count = time.monotonic() + 60 * MINUTES / len(BACKENDS) / len(SEARCHES), 0
    while time.monotonic() < end:
        chosen = random.randrange(2**32)
        print(f"\n{backend}, {what}: {count} programs; next: seed {chosen}", end="", flush=True)
        seed(chosen)(search(ROUND, backend, operations))()
        count += ROUND.max_examples


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["reference", "foreach", "native"], indirect=True)
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_replicas(backend, tmp_path):
    fuzz_ranks.run(backend, tmp_path, count=50)
