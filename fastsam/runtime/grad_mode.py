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

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)
        # What torch.no_grad() does, without its ten Python calls.
        was_enabled = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(was_enabled)

    return run
