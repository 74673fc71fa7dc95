"""Calls the compiled operators of csrc/: the operations as single passes over a table of addresses."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.backends import AdamOptions, BackendUnavailable, ClimbOptions, SGDOptions
from fastsam.tensor_table import TensorTable

# 256 KiB of float32: small enough to share out evenly, large enough for the prefetchers (at 64 KiB and less, walking
# chunks backward costs perturb_ up to a half).
CHUNK_SIZE = 65536

try:
    importlib.import_module("fastsam._C")  # registers torch.ops.fastsam
    _missing = ""
except ImportError as error:
    _missing = str(error)

_ops: Any = torch.ops.fastsam


def check(device_type: str) -> None:
    if _missing:
        raise BackendUnavailable(
            f"fastsam was installed without its compiled extension ({_missing}) and is several times slower; reinstall "
            "with a C++ compiler: pip install --no-build-isolation --no-deps fastsam-optim"
        )
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastsam::perturb_", device_type.upper()):
        raise BackendUnavailable(f"the compiled extension has no kernels for {device_type!r}")


def grad_norm(tables: Sequence[TensorTable], options: Sequence[ClimbOptions]) -> Tensor:
    norm = _kept(tables[0], "norm", (), torch.float64)
    for position, table in enumerate(tables):
        arguments = _arguments(table)
        partials = _kept(table, "partials", (arguments[2].shape[0],), torch.float64)
        last = position == len(tables) - 1
        _ops.grad_norm_(*arguments, _packed(table, options), partials, norm, position == 0, last)
    return norm


def perturb_(table: TensorTable, norm: Tensor, options: Sequence[ClimbOptions]) -> None:
    _ops.perturb_(*_arguments(table), _packed(table, options), norm)


def restore_(table: TensorTable) -> None:
    _ops.restore_(*_arguments(table))


def restore_and_sgd_(
    table: TensorTable, options: Sequence[SGDOptions], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    _update(_ops.restore_and_sgd_, table, options, grad_scale, found_inf)


def restore_and_adam_(
    table: TensorTable, options: Sequence[AdamOptions], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    _update(_ops.restore_and_adam_, table, options, grad_scale, found_inf)


def _update(
    operator: Callable[..., None],
    table: TensorTable,
    options: Sequence[SGDOptions] | Sequence[AdamOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    operator(*_arguments(table), _packed(table, options), table.steps, grad_scale, found_inf)


def _arguments(table: TensorTable) -> tuple[Tensor, Tensor, Tensor, int, torch.dtype]:
    return table.addresses, table.tensors, table.chunks(CHUNK_SIZE), CHUNK_SIZE, table.dtype


Options = Sequence[ClimbOptions] | Sequence[SGDOptions] | Sequence[AdamOptions]


def _packed(table: TensorTable, options: Options) -> Tensor:
    """The options as float64 ``(groups, fields)``, made anew only when a number has changed."""
    numbers = [tuple(map(float, group)) for group in options]
    key = type(options[0]).__name__
    if key not in table.cache or table.cache[key][0] != numbers:
        table.cache[key] = numbers, torch.tensor(numbers, dtype=torch.float64)
    packed: Tensor = table.cache[key][1]
    return packed


def _kept(table: TensorTable, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that the table keeps from step to step."""
    if key not in table.cache:
        table.cache[key] = torch.empty(shape, dtype=dtype, device=table.device)
    tensor: Tensor = table.cache[key]
    return tensor
