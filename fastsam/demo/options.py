"""The demo's command-line options and their checks."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastsam.backends import BACKENDS, BackendUnavailable, resolve

# The keys of fastsam.demo.methods.FAMILY, whose members are made with these options.
FAMILY_NAMES = (
    "sam-3",
    "interval",
    "late",
    "aesam",
    "asam",
    "gsam",
    "wsam",
    "looksam",
    "friendly",
    "momentum",
    "amp",
    "awp",
    "random",
    "stable",
    "vasso",
    "unified",
    "sagm",
    "lesam",
    "esam",
    "zsharp",
    "gcsam",
)


@dataclass(frozen=True)
class Options:
    """The demo's options; see ``python -m fastsam demo --help``."""

    noise: float = 0.4
    rho: float = 0.2
    seeds: int = 3
    epochs: int = 30
    batch_size: int = 16
    lr: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "auto"
    method: str = "sam"
    mixup: float = 0.0
    swa: bool = False
    batch_norm: bool = True
    output: Path = Path("fastsam-demo.png")
    sweep: tuple[float, ...] | None = None
    quick: bool = False


Chosen = TypeVar("Chosen", bound=Options)


def add_arguments(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Adds the demo's options but those of ``without`` to a parser; their defaults are those of :class:`Options`."""

    def add(name: str, description: str, **settings: Any) -> None:
        if name not in without:
            parser.add_argument(name, help=description, **settings)

    add(
        "--noise",
        "share of the training labels that are replaced by a wrong one (default: %(default)s)",
        type=number("in [0, 1]", lambda x: 0 <= x <= 1),
        metavar="SHARE",
    )
    add("--rho", "radius of FastSAM's neighbourhood (default: %(default)s)", type=number(">= 0", lambda x: x >= 0))
    add(
        "--seeds",
        "runs of each method; a seed determines the split, the wrong labels, the initial weights and the order "
        "of the batches, the same for every method (default: %(default)s)",
        type=count,
        metavar="N",
    )
    add(
        "--epochs",
        "passes over the 900 training images; SGD also runs with twice as many (default: %(default)s)",
        type=count,
        metavar="N",
    )
    add("--batch-size", "images per step (default: %(default)s)", type=count, metavar="N")
    add(
        "--lr",
        "initial learning rate of every method (default: each one's best, see --sweep)",
        type=number("> 0", lambda x: x > 0),
    )
    add("--device", "torch device to train on (default: %(default)s)", type=_device)
    add("--backend", "FastSAM's backend (default: %(default)s, the fastest that can run)", choices=("auto", *BACKENDS))
    add(
        "--method",
        "a method of the SAM family to compare with the others, or all of them, which takes about "
        "twenty minutes (default: only %(default)s)",
        choices=("sam", "all", *FAMILY_NAMES),
    )
    add(
        "--mixup",
        "also train SGD and FastSAM on mixtures of two images and their labels, with weights from Beta(ALPHA, ALPHA) "
        "(default: %(default)s, no mixtures)",
        type=number(">= 0", lambda x: x >= 0),
        metavar="ALPHA",
    )
    add(
        "--swa",
        "also average the weights of SGD and FastSAM over the last quarter of the epochs",
        action="store_true",
    )
    add(
        "--no-batch-norm",
        "train the network without batch norm (the learning rates are not tuned for it)",
        action="store_false",
        dest="batch_norm",
    )
    add("--output", "the picture, a PNG (default: %(default)s)", type=Path, metavar="FILE")
    add(
        "--sweep",
        "train at each of these learning rates (by default nine), and print a table of accuracies instead: the method "
        "that --method names, or the usual three, which takes about 15 minutes",
        type=number("> 0", lambda x: x > 0),
        nargs="*",
        metavar="LR",
    )
    add("--quick", "one seed and two epochs, to check that everything works", action="store_true")
    parser.set_defaults(**vars(Options()))


def to_options(namespace: argparse.Namespace, parser: argparse.ArgumentParser, kind: type[Chosen]) -> Chosen:
    """The options of class ``kind``; ends with a usage error if the backend or the output cannot be used."""
    values = {name: getattr(namespace, name) for name in kind.__dataclass_fields__}
    values["sweep"] = None if values["sweep"] is None else tuple(values["sweep"])
    options = kind(**values | ({"seeds": 1, "epochs": 2} if namespace.quick else {}))
    if options.output.suffix.lower() != ".png":
        parser.error(f"argument --output: must end in .png, got '{options.output}'")
    if not os.access(options.output.absolute().parent, os.W_OK):
        parser.error(f"argument --output: the folder '{options.output.parent}' does not exist or is not writable")
    try:
        resolve(options.backend, options.device.type)
    except BackendUnavailable as reason:
        parser.error(f"argument --backend: {options.backend!r} cannot run on {options.device.type!r}: {reason}")
    return options


def number(condition: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A parser of numbers for which ``holds`` is true."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"must be a number {condition}, got {text!r}")
        return value

    return parse


def count(text: str) -> int:
    """A parser of whole numbers >= 1."""
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
