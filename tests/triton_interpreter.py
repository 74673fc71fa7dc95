"""Triton's interpreter for machines without a GPU, several times as fast: without what it does in vain."""

import dataclasses
import os

import torch

THOROUGH = os.environ.get("FASTSAM_THOROUGH", "0") != "0"


def set_up():
    """To be called before the kernels are imported. Where there is a GPU, they are compiled for it instead."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    # None of these names is public: where one is missing, tests only take longer.
    if hasattr(interpreter, "_patch_lang"):
        prepare_once_per_launch(interpreter)
    if hasattr(interpreter, "interpreter_builder"):
        leave_overflows_alone(interpreter.interpreter_builder)


def runs(backend, device):
    """Whether the interpreter runs ``backend`` on ``device``: at a microsecond per element, a hundred per operation."""
    return backend == "triton" and device.type == "cpu"


def fewer(count, few, backend, device):
    """``few`` instead of ``count`` steps where the interpreter runs them; FASTSAM_THOROUGH=1: all the same."""
    return few if runs(backend, device) and not THOROUGH else count


def prepare_once_per_launch(interpreter):
    """Left to itself, it prepares its language in every function that a kernel calls."""
    patch = interpreter._patch_lang
    prepared = set()

    def patch_once(function):
        if function.__module__ in prepared:
            return None
        prepared.add(function.__module__)
        scope = patch(function)
        restore = scope.restore
        scope.restore = lambda: (restore(), prepared.clear())
        return scope

    interpreter._patch_lang = patch_once


def leave_overflows_alone(builder):
    """It looks for an overflow after every sum of integers, and says nothing of one unless it is debugging."""
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
