"""Functions that autograd does not see, whatever mode they are called in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def untracked(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """``torch.no_grad()`` around ``function``, and no ``torch.inference_mode()``.

    What is allocated in inference mode (backups, state) could not be written to outside of it.
    """
    without_grad = torch.no_grad()(function)
    with_counters = torch.inference_mode(False)(without_grad)

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        chosen = with_counters if torch.is_inference_mode_enabled() else without_grad
        return chosen(*args, **kwargs)

    return run
