"""The demo's options: what the command line takes, and its checks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastsam.backends import BACKENDS, BackendUnavailable, resolve


@dataclass(frozen=True)
class Options:
    """The demo's options; see ``python -m fastsam demo --help``."""

    noise: float = 0.4
    rho: float = 0.2
    seeds: int = 3
    epochs: int = 30
    batch_size: int = 16
    lr: float | None = None
    device: torch.device = torch.device("cpu")
    backend: str = "auto"
    output: Path = Path("fastsam-demo.png")
    sweep: bool = False
    quick: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to a parser."""
    default = Options()
    add = parser.add_argument
    add("--noise", type=_number("in [0, 1]", lambda x: 0 <= x <= 1), default=default.noise, metavar="SHARE",
        help="share of the training labels that are replaced by a wrong one (default: %(default)s)")  # fmt: skip
    add("--rho", type=_number(">= 0", lambda x: x >= 0), default=default.rho,
        help="radius of FastSAM's neighbourhood (default: %(default)s)")  # fmt: skip
    add("--seeds", type=_count, default=default.seeds, metavar="N",
        help="runs per method; a seed decides the split, the noise, the initial weights and the order of the "
        "batches, the same for every method (default: %(default)s)")  # fmt: skip
    add("--epochs", type=_count, default=default.epochs, metavar="N",
        help="passes over the 900 training images; SGD is shown with twice as many too (default: %(default)s)")  # fmt: skip
    add("--batch-size", type=_count, default=default.batch_size, metavar="N", help="images per step (default: %(default)s)")  # fmt: skip
    add("--lr", type=_number("> 0", lambda x: x > 0), default=default.lr,
        help="learning rate of every method (default: each one's best, from --sweep)")  # fmt: skip
    add("--device", type=_device, default=default.device, help="torch device to train on (default: %(default)s)")
    add("--backend", choices=("auto", *BACKENDS), default=default.backend,
        help="FastSAM's backend (default: %(default)s, the fastest that can run)")  # fmt: skip
    add("--output", type=Path, default=default.output, metavar="FILE", help="the picture, a PNG (default: %(default)s)")
    add("--sweep", action="store_true",
        help="instead, train every method at eight learning rates and print their accuracies; takes about 12 minutes")  # fmt: skip
    add("--quick", action="store_true", help="one seed and two epochs, whatever else is asked: does everything work?")


def to_options(namespace: argparse.Namespace, parser: argparse.ArgumentParser) -> Options:
    """Checks what no option can check alone; ends with a usage error if the backend or the output cannot be."""
    values = {name: getattr(namespace, name) for name in Options.__dataclass_fields__}
    options = Options(**values | ({"seeds": 1, "epochs": 2} if namespace.quick else {}))
    if options.output.suffix.lower() != ".png":
        parser.error(f"argument --output: must end in .png, got '{options.output}'")
    if not options.output.absolute().parent.is_dir():
        parser.error(f"argument --output: there is no folder '{options.output.parent}'")
    try:
        resolve(options.backend, options.device.type)
    except BackendUnavailable as reason:
        parser.error(f"argument --backend: {options.backend!r} cannot run on {options.device.type!r}: {reason}")
    return options


def _number(condition: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"must be a number {condition}, got {text!r}")
        return value

    return parse


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    return device
