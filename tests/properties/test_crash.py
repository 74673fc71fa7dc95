"""A training run that is killed goes on from its last checkpoint and ends as if nothing had happened (`make crash`)."""

import subprocess
import sys

import pytest
from checkout import ROOT


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one():
    if not (ROOT / "tools" / "crash.py").exists():
        pytest.skip("the tests run without the checkout, against an installed wheel")
    command = [sys.executable, "tools/crash.py", "--kills=4", "--steps=20", "--save-every=2", "--seed=0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("after 4 kills: the same bits\n")
