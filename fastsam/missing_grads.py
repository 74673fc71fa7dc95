"""What is said when a step finds no gradient at all: an error that names the reason, or a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NoReturn

from fastsam.distributed import is_distributed

_NO_GRADIENT = (
    "no parameter has a gradient; call backward() first, and if something has replaced the model's parameters, "
    "construct the optimizer after that: after fully_shard()"
)


def refuse_missing_grads(params: Iterable[Any]) -> NoReturn:
    """Raises RuntimeError; if the sharding is the reason, its message says so."""
    _check_sharding(params)
    raise RuntimeError(_NO_GRADIENT)


def warn_of_missing_grads(params: Iterable[Any]) -> None:
    """Warns that a step without gradients has changed nothing; torch's optimizers say nothing of such a step.

    Raises:
        RuntimeError: the gradients are missing because of how the model is sharded.
    """
    _check_sharding(params)
    warnings.warn(f"a step has changed nothing: {_NO_GRADIENT}", UserWarning, stacklevel=3)


def _check_sharding(params: Iterable[Any]) -> None:
    # In torch 2.10 a parameter has no mark of fully_shard() having replaced it.
    for index, param in enumerate(params):
        if getattr(param, "_fsdp_orig_uid", None) is not None:
            raise RuntimeError(
                f"parameter {index} (shape {tuple(param.shape)}) is no longer the model's: fully_shard() has replaced "
                "it; construct the optimizer after fully_shard()"
            )
        if is_distributed(param) and param.requires_grad:
            raise RuntimeError(
                f"parameter {index} (shape {tuple(param.shape)}) and all others have no gradient after the first pass; "
                "call backward() in it, under FSDP with set_requires_gradient_sync(True)"
            )
