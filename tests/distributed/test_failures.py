"""Failures of single ranks, and of whole jobs: weights come back, jobs resume."""

import os
import subprocess
import sys
from pathlib import Path

import failures
import pytest
from checkout import ROOT


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_closure_that_raises_on_one_rank(ranks, failing_pass):
    (other, *others), (failed, *mine) = ranks(failures.closure_raises, failing_pass)
    assert failed == "ValueError: on this rank alone"
    assert other  # an error of the group's: it has waited no longer than its timeout
    assert mine == [True, True, False]
    assert others == [True, True, False] or failing_pass == 2


def test_rank_that_does_not_come_to_first_step(ranks):
    results = ranks(failures.two_phases_fail)
    assert results[0][0]
    assert [result[1:] for result in results] == [(True, False)] * 2


SCRIPT = Path(__file__).parent / "killed_run.py"


@pytest.mark.slow
@pytest.mark.thorough
def test_killed_job_resumes_with_the_same_bits(tmp_path):
    """SIGKILL of a rank while the weights are perturbed; torchrun starts the job again."""
    if not (ROOT / "examples").exists():
        pytest.skip("the tests run without the checkout, against an installed wheel")
    results = [run(tmp_path / name, kill_at) for name, kill_at in (("undisturbed", -1), ("killed", 7))]
    assert results[0] == results[1]


def run(folder, kill_at):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    port = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [*launcher, *port, str(SCRIPT), str(folder), str(kill_at)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, timeout=280, env=environment, stdout=subprocess.DEVNULL)
    return (folder / "result").read_text()
