"""The examples and ``doctor --distributed``, on two ranks; by their own commands in the thorough tier."""

import os
import shlex
import socket
import subprocess
import sys

import example_runs
import pytest

pytestmark = pytest.mark.skipif(
    not example_runs.EXAMPLES.exists(), reason="the tests run without the checkout, against an installed wheel"
)


def test_fsdp2_resumes(ranks, tmp_path):
    for whole, resumed in ranks(example_runs.fsdp2, tmp_path):
        assert whole == resumed


def test_ddp(ranks):
    pytest.importorskip("sklearn")
    for accuracy, is_same in ranks(example_runs.ddp):
        assert accuracy > 0.3
        assert is_same


def test_tensor_parallel(ranks):
    assert max(ranks(example_runs.tensor_parallel)) < 1e-5


def test_doctor(ranks):
    (status, report), _ = ranks(example_runs.doctor, False)
    assert status == 0
    assert "FSDP2, AWP" in report
    assert "WRONG" not in report


def test_doctor_finds_what_is_wrong(ranks):
    results = ranks(example_runs.doctor, True)
    assert [status for status, _ in results] == [1, 1]
    assert "WRONG" in results[0][1]


def test_doctor_needs_torchrun(ranks):
    status, said = ranks(example_runs.doctor_alone)[0]
    assert status == 1
    assert "torchrun" in said


DOCTOR = "torchrun --nproc-per-node=2 -m fastsam doctor --distributed"
PRINTS = {
    "fsdp2": "step 60: loss",
    "ddp": "test accuracy",
    "tensor_parallel": "largest difference",
    DOCTOR: "FSDP2, AWP",
}


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", PRINTS)
def test_command(tmp_path, name):
    """The command in an example's first lines, from a folder that has the examples."""
    if name == "ddp":
        pytest.importorskip("sklearn")
    (tmp_path / "examples").symlink_to(example_runs.EXAMPLES)
    command = name if name == DOCTOR else command_of(name)
    result = run_under_torchrun(shlex.split(command, comments=True), tmp_path)
    assert result.returncode == 0, result.stderr
    assert PRINTS[name] in result.stdout


def command_of(example):
    lines = (example_runs.EXAMPLES / f"{example}.py").read_text().splitlines()
    return next(line.strip() for line in lines if line.strip().startswith("torchrun"))


def run_under_torchrun(command, folder):
    """Runs a command that begins with torchrun, which listens on a free port: others may be running."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PET_MASTER_PORT": str(port)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
