"""What the tests of the public face reach inside the package for: faults to inject, and what no public name shows."""

from torch import Tensor

from fastsam import phases
from fastsam.backends import (
    BACKENDS,
    BackendUnavailable,
    Request,
    foreach,
    load,
    native,
    reference,
    resolve,
    triton_gpu,
)
from fastsam.bases import FUSED as FUSED_CLASSES
from fastsam.precision import PRECISION_OPTIONS
from fastsam.runtime.interrupts import DeferredInterrupts
from fastsam.runtime.replay_rng import GeneratorStates
from fastsam.tables import TensorTable
from fastsam.tables.state import StateSlots

__all__ = [
    "BACKENDS",
    "FUSED_CLASSES",
    "MODULES",
    "PRECISION_OPTIONS",
    "TRITON_MODULE",
    "UPDATE_OPERATIONS",
    "WORK_FILES",
    "BackendUnavailable",
    "DeferredInterrupts",
    "GeneratorStates",
    "Request",
    "backups",
    "base_step",
    "directions",
    "first_gradients",
    "foreach",
    "load",
    "native",
    "publish_state",
    "reference",
    "resolve",
    "table_count",
    "table_params",
    "update_operations",
]

MODULES = {"reference": reference, "foreach": foreach, "native": native, "triton": triton_gpu}
TRITON_MODULE = "fastsam.backends.triton_gpu"
UPDATE_OPERATIONS = ("restore_and_update_",)
# Where weights are written, relative to the package: nothing here may be interrupted half-way.
WORK_FILES = ("tables", "backends")

# (object, attribute) of the functions that begin the update: the state is published, the base's own step runs.
publish_state = (StateSlots, "publish")
base_step = (phases, "run_step")


def update_operations(operations) -> list[tuple[object, str]]:
    """(module, attribute) of the fused updates that a step with the backend ``operations`` may run."""
    return [(module, name) for module in {operations, foreach} for name in UPDATE_OPERATIONS]


def table_params(table: TensorTable) -> list[Tensor]:
    """The parameters that an operation is given."""
    return table.params


def table_count(optimizer) -> int:
    return len(list(optimizer._engine.tables))


def backups(optimizer) -> list[Tensor]:
    """Where the weights are kept during the second pass."""
    return [backup for table in optimizer._engine.tables for backup in table.backups if backup is not None]


def first_gradients(optimizer) -> list[Tensor | None]:
    """The first pass's gradients that are held for the update."""
    return [tensor for table in optimizer._engine.tables for tensor in table.first_grads]


def directions(optimizer) -> list[Tensor | None]:
    """The directions of ascent that are held for the step."""
    return [tensor for table in optimizer._engine.tables for tensor in table.directions]
