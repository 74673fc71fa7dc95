"""The options of ``python -m fastsam sharpness``: the demo's, and what is measured."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from fastsam.demo import options as demo_options
from fastsam.demo.options import Options, count, number


@dataclass(frozen=True)
class SharpnessOptions(Options):
    """The options; see ``python -m fastsam sharpness --help``."""

    radius: float = 0.1
    m: bool = False
    processes: int = min(2, os.cpu_count() or 1)
    output: Path = Path("fastsam-sharpness.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to a parser."""
    demo_options.add_arguments(parser, without=("--sweep",))
    parser.add_argument(
        "--radius",
        help="of the perturbations that are measured (default: %(default)s)",
        type=number("> 0", lambda x: x > 0),
    )
    parser.add_argument(
        "--m",
        help="compare other perturbations instead: SAM with an ascent for each 16, 4 and 1 images (m-sharpness), with "
        "one by the gradient of all images (n-SAM), and in random directions",
        action="store_true",
    )
    parser.add_argument("--processes", help="how many runs at once (default: %(default)s)", type=count, metavar="N")
    parser.set_defaults(**vars(SharpnessOptions()))


def to_options(namespace: argparse.Namespace, parser: argparse.ArgumentParser) -> SharpnessOptions:
    """Checks combinations of options; ends with a usage error if they cannot be used."""
    return demo_options.to_options(namespace, parser, SharpnessOptions)
