"""A training run that is killed goes on from its last checkpoint and ends as if nothing had happened (`make crash`)."""

import subprocess
import sys

import pytest
from checkout import ROOT


@pytest.mark.slow
@pytest.mark.thorough  # and in CI, as make crash
@pytest.mark.parametrize(("kills", "steps"), [(4, 20)])
def test_killed_run_ends_as_undisturbed_one(kills, steps):
    if not (ROOT / "tools" / "crash.py").exists():
        pytest.skip("the tests run without the checkout, against an installed wheel")
    command = [sys.executable, "tools/crash.py", f"--kills={kills}", f"--steps={steps}", "--save-every=2", "--seed=0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(f"after {kills} kills: the same bits\n")
