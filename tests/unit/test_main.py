"""``python -m fastsam``: the list of commands, their help, and the hand-over to pytest."""

import subprocess
import sys
from pathlib import Path

import pytest
from child import run_python

import fastsam
from fastsam import __main__ as command_line
from fastsam.demo.options import Options


def test_without_arguments_lists_commands(capsys):
    assert command_line.main([]) == 0
    alone = capsys.readouterr().out
    assert all(command in alone for command in ("demo", "sharpness", "doctor", "bench"))
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == alone


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fastsam {fastsam.__version__}\n"


def test_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["demonstrate"])
    assert exit_.value.code == 2
    assert "'demonstrate'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "sharpness", "doctor", "bench"])
def test_help_of_command(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        command_line.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"python -m fastsam {command}" in capsys.readouterr().out


def test_help_of_demo_has_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["demo", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, default in vars(Options()).items():
        option = name.replace("_", "-")
        assert (f"--no-{option}" if default is True else f"--{option}") in printed
        assert (
            default in (None, False, True) or f"default: {default}" in printed or f"default: only {default}" in printed
        )
    assert "==SUPPRESS==" not in printed
    assert "None" not in printed


def test_bench_hands_its_arguments_to_pytest(monkeypatch, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "conftest.py").touch()
    monkeypatch.setattr(fastsam, "__file__", str(tmp_path / "fastsam" / "__init__.py"))
    calls = []

    def run(command, cwd, check):
        calls.append((command, Path(cwd)))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", run)
    assert command_line.main(["bench", "--plot", "speed.png", "-k", "sgd"]) == 7
    pytest_command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark", "--plot", "speed.png", "-k", "sgd"]
    assert calls == [(pytest_command, tmp_path)]


def test_bench_outside_checkout_says_where_it_works(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fastsam, "__file__", str(tmp_path / "fastsam" / "__init__.py"))
    assert command_line.main(["bench"]) == 1
    assert "from a checkout of the FastSAM repository" in capsys.readouterr().err


def test_runs_as_module():
    done = run_python("import runpy; runpy.run_module('fastsam', run_name='__main__')", "--version")
    assert (done.returncode, done.stdout) == (0, f"fastsam {fastsam.__version__}\n")
