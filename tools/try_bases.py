"""Tries every optimizer of a package as a base, and prints a table of what works.

    pip install pytorch_optimizer==4.1.0 heavyball==3.2.1 bitsandbytes==0.50.2
    python tools/try_bases.py --markdown docs/bases_table.md
    python tools/try_bases.py --module heavyball
    python tools/try_bases.py --module bitsandbytes.optim Adam8bit

Each base takes SAM steps through FastSAM and by hand (perturb, restore, its own ``step()``), with a pickled checkpoint
in the middle, from which new optimizers go on. Both must arrive at the same weights. Where a base amplifies rounding
errors (by eigenvectors, say), in float64; where that is too coarse as well, with rho = 0, where both take the same
numbers.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import inspect
import io
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsam import FastSAM

RHO = 0.05
STEPS = 3
X = torch.linspace(-1, 1, 64).reshape(16, 4).sin()
Y = X.roll(1, dims=1)[:, :2]


def make_model() -> nn.Module:
    """The same model every time, of torch's default dtype."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model: nn.Module) -> Tensor:
    """The loss over all data."""
    dtype = torch.get_default_dtype()
    return nn.functional.mse_loss(model(X.to(dtype)), Y.to(dtype))


def step_by_hand(model: nn.Module, base: torch.optim.Optimizer, rho: float = RHO) -> None:
    """Foret et al., equation 2, with the base's own step."""
    params = list(model.parameters())
    base.zero_grad()
    loss_of(model).backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in params]).double())
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for param in params:
            param.add_((rho / (norm + 1e-12)) * param.grad)
    base.zero_grad()
    loss_of(model).backward()
    with torch.no_grad():
        for param, old in zip(params, before, strict=True):
            param.copy_(old)
    base.step()


def step_by_fastsam(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The same with FastSAM."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)


def train(make: Callable[[nn.Module], Any], step: Callable[[nn.Module, Any], None], resume: bool) -> list[Tensor]:
    """The weights after ``2 * STEPS`` steps; ``resume``: with a new optimizer from a checkpoint after half of them."""
    model = make_model()
    optimizer = make(model)
    for _ in range(2):
        if hasattr(optimizer, "train"):
            optimizer.train()
        torch.manual_seed(1)
        for _ in range(STEPS):
            step(model, optimizer)
        if resume:
            file = io.BytesIO()
            torch.save(copy.deepcopy(optimizer.state_dict()), file)
            file.seek(0)
            optimizer = make(model)
            optimizer.load_state_dict(torch.load(file, weights_only=False))
    return [p.detach() for p in model.parameters()]


def differs(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two results differ by more than rounding errors."""
    return not all(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in zip(one, other, strict=True))


def try_base(base: type[torch.optim.Optimizer], rho: float = RHO) -> tuple[str, str]:
    """What comes of it: "works", "refused", "not alone" (nor by hand) or "WRONG"; and a remark."""
    make_base = lambda model: base(model.parameters())  # noqa: E731
    make_fastsam = lambda model: FastSAM(model.parameters(), base, rho=rho)  # noqa: E731
    by_itself = functools.partial(step_by_hand, rho=rho)
    by_hand: dict[bool, Any] = {}
    for resume in (False, True):
        try:
            by_hand[resume] = train(make_base, by_itself, resume)
        except Exception as error:
            by_hand[resume] = error
    if isinstance(by_hand[False], Exception):
        try:
            make_fastsam(make_model())
        except (TypeError, ValueError) as error:
            if "is not supported" in str(error):
                return "refused", str(error)
        return "not alone", f"{type(by_hand[False]).__name__}: {by_hand[False]}"
    if differs(train(make_base, by_itself, False), by_hand[False]):
        return "not alone", "two runs of it differ"
    remarks = []
    for resume in (False, True):
        expected = by_hand[resume]
        try:
            found = train(make_fastsam, step_by_fastsam, resume)
        except Exception as error:
            if isinstance(expected, Exception) and type(error) is type(expected):
                remarks.append(f"cannot resume, nor can it alone ({type(error).__name__})")
                continue
            return "refused", f"{type(error).__name__}: {error}"
        if isinstance(expected, Exception):
            remarks.append("resumes, which it cannot alone")
        elif differs(found, expected):
            return "WRONG", "after resuming" if resume else "weights differ"
    return "works", "; ".join(remarks)


def try_exactly(base: type[torch.optim.Optimizer]) -> tuple[str, str]:
    """:func:`try_base`, in float64 where float32 is too coarse, and with rho = 0 where float64 is."""
    outcome, remark = try_base(base)
    if outcome != "WRONG":
        return outcome, remark
    torch.set_default_dtype(torch.float64)
    try:
        finer, _ = try_base(base)
    finally:
        torch.set_default_dtype(torch.float32)
    if finer == "works":
        return finer, "amplifies rounding errors; compared in float64"
    if try_base(base, rho=0.0) == ("works", ""):
        return "works", "amplifies rounding errors; compared with rho = 0"
    return outcome, remark


# For constructors that need an lr; so that 8-bit state is not only for large tensors (bitsandbytes).
DEFAULTS = {"lr": 0.01, "momentum": 0.9}
ALWAYS = {"min_8bit_size": 1}


def completed(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The class with a value for each argument that it would not run without."""
    known = inspect.signature(base).parameters
    options = {name: value for name, value in ALWAYS.items() if name in known}
    options |= {n: v for n, v in DEFAULTS.items() if n in known and (known[n].default in (known[n].empty, 0))}
    if not options:
        return base

    def __init__(self: Any, params: Any, **others: Any) -> None:
        base.__init__(self, params, **{**options, **others})

    return type(base.__name__, (base,), {"__init__": __init__})


def of_module(name: str) -> Mapping[str, type[torch.optim.Optimizer]]:
    """A module's optimizers by name; HeavyBall's without its compiler, which takes minutes."""
    module = importlib.import_module(name)
    if name == "heavyball":
        importlib.import_module("heavyball.utils").compile_mode = None
    is_optimizer = lambda found: inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)  # noqa: E731
    return {name: completed(found) for name, found in inspect.getmembers(module, is_optimizer)}


def of_pytorch_optimizer(names: list[str]) -> Mapping[str, Callable[[], type[torch.optim.Optimizer]]]:
    """That package's by the names of its own; classes whose dependencies are missing raise when they are loaded."""
    import pytorch_optimizer

    load = pytorch_optimizer.load_optimizer
    return {name: functools.partial(load, name) for name in names or pytorch_optimizer.get_supported_optimizers()}


def first_line(text: str) -> str:
    """The text as a cell of a table."""
    return text.strip().splitlines()[0].replace("|", "/")[:110] if text.strip() else ""


def main() -> int:
    """Prints the table; 1 if a base goes wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--module", help="of this module, in pytorch_optimizer's place")
    parser.add_argument("names", nargs="*", help="only these optimizers")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.module is None:
        bases = of_pytorch_optimizer(arguments.names)
    else:
        found = of_module(arguments.module)
        bases = {name: functools.partial(found.__getitem__, name) for name in arguments.names or found}
    torch.set_num_threads(1)
    rows, counts = [], dict.fromkeys(("works", "refused", "not alone", "WRONG"), 0)
    for name, load in bases.items():
        try:
            outcome, remark = try_exactly(load())
        except Exception as error:  # the package's own optional dependencies, say
            outcome, remark = "not alone", f"{type(error).__name__}: {error}"
        counts[outcome] += 1
        rows.append(f"| {name} | {outcome} | {first_line(remark)} |")
        print(rows[-1], flush=True)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(summary)
    if arguments.markdown:
        table = "\n".join(["| base | outcome | remark |", "|---|---|---|", *rows, "", f"In all: {summary}.", ""])
        arguments.markdown.write_text(table)
    return int(counts["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
