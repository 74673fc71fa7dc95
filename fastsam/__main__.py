"""``python -m fastsam``, or ``fastsam``: the commands demo, sharpness, doctor and bench."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fastsam
from fastsam import demo, doctor
from fastsam.demo import options as demo_options
from fastsam.demo.sharpness import options as sharpness_options
from fastsam.doctor import ranks

DEMO = """\
Train a small CNN on scikit-learn's 1,797 scanned digits, 900 of them to train on with part of their labels wrong: with
SGD, with SGD for twice the epochs (as many gradients as SAM takes), and with FastSAM. Prints a table and draws the
accuracy curves and the loss around the solutions. Takes about two minutes on one CPU core.
"""

SHARPNESS = """\
Train as the demo does, and measure how sharp the solutions are: the largest eigenvalues of the loss's Hessian, its
trace and density, and how much the loss rises around the weights. Prints a table and draws spectra, losses and
sharpness over the epochs. Takes three and a half minutes on two CPU cores.
"""

DOCTOR = """\
Print versions, devices and what is compiled; check every backend that can run here against `reference`, and say why
the others cannot. The exit status is 1 if a backend computes something wrong.
"""

BENCH = """\
Measure FastSAM on shapes of real models, from a checkout of the repository: runs `pytest benchmarks/ --benchmark` and
hands it all further arguments.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    Args:
        argv: the arguments after ``python -m fastsam``; None takes them from the command line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"] and arguments[1:] not in (["-h"], ["--help"]):
        return bench(arguments[1:])
    parser, demo_parser, sharpness_parser = _parsers()
    namespace = parser.parse_args(arguments)
    if namespace.command == "demo":
        return demo.run(demo_options.to_options(namespace, demo_parser, demo_options.Options))
    if namespace.command == "sharpness":
        from fastsam.demo.sharpness.command import run  # imports what the other commands do not need

        return run(sharpness_options.to_options(namespace, sharpness_parser))
    if namespace.command == "doctor":
        return ranks.run() if namespace.distributed else doctor.run(as_json=namespace.json)
    parser.print_help()
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Runs the repository's benchmarks with pytest, in the checkout's folder; returns pytest's exit status."""
    folder = Path(fastsam.__file__).resolve().parents[1] / "benchmarks"
    if not (folder / "conftest.py").is_file():
        print(
            "the benchmarks are not part of the installed package: run this from a checkout of the FastSAM repository "
            "(make bench there sets up all it needs)",
            file=sys.stderr,
        )
        return 1
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark", *arguments]
    return subprocess.run(command, cwd=folder.parent, check=False).returncode


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        prog="python -m fastsam",
        description="FastSAM: Sharpness-Aware Minimization as fused operations for PyTorch.",
    )
    parser.add_argument("--version", action="version", version=f"fastsam {fastsam.__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    demo_parser = commands.add_parser("demo", help="train with SGD and with FastSAM on wrong labels", description=DEMO)
    demo_options.add_arguments(demo_parser)
    sharpness_parser = commands.add_parser(
        "sharpness", help="how sharp the minima of SGD and FastSAM are", description=SHARPNESS
    )
    sharpness_options.add_arguments(sharpness_parser)
    doctor_parser = commands.add_parser(
        "doctor", help="what works on this machine, and why the rest does not", description=DOCTOR
    )
    doctor_parser.add_argument("--json", action="store_true", help="print the report as JSON, for a bug report")
    doctor_parser.add_argument(
        "--distributed", action="store_true", help="check training over several ranks; run it under torchrun"
    )
    commands.add_parser("bench", help="measure the optimizers (in a checkout)", description=BENCH)
    return parser, demo_parser, sharpness_parser


def command() -> int:
    """Runs the command line; Ctrl-C ends it without a traceback. The console script ``fastsam`` calls this."""
    try:
        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(command())
