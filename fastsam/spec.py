"""Plain data that Python, C++ and Triton share: table rows, options, forms, coefficients, random draws, state names.

The kernels in ``kernels/`` read these numbers from here; ``csrc/spec.h`` repeats them, and a test compares the two.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Row(IntEnum):
    """What a row of a table's addresses holds for each parameter; an address of 0 says "absent"."""

    PARAM = 0
    GRAD = 1
    BACKUP = 2
    """The weights at w, of the parameters that the ascent moves; with master weights, the master."""
    STATE = 3
    """The first of ``STATE_SLOTS`` rows: momentum, or Adam's moments."""
    STATE_1 = 4
    STATE_2 = 5
    MASTER = 6
    """The float32 weights of 16-bit parameters."""
    FIRST_GRAD = 7
    """The first pass's gradient, where a method needs it for the descent."""
    DIRECTION = 8
    """A direction of ascent that is not a gradient, for example a random one."""
    METHOD_STATE = 9
    """A method's state, from step to step."""
    STEP = 10
    """The float32 count of the parameter's updates; absent where it is not needed."""


ROWS = len(Row)
STATE_SLOTS = 3


class Update(IntEnum):
    """The base update that runs fused with the restore."""

    NONE = 0
    """The base's own ``step()`` follows: the gradients are prepared for it."""
    SGD = 1
    ADAM = 2


class AscentOptions(NamedTuple):
    """How the parameters of one group ascend. Numbers may be 0-dim tensors."""

    rho: float | Tensor
    adaptive: bool
    maximize: bool
    rounding_seed: int = 0


class SGDOptions(NamedTuple):
    """``torch.optim.SGD``'s options for one parameter group."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    rounding_seed: int = 0


class AdamOptions(NamedTuple):
    """``torch.optim.Adam``'s and ``AdamW``'s options for one parameter group."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool
    maximize: bool
    rounding_seed: int = 0


BaseOptions = SGDOptions | AdamOptions
"""Those of a base that runs fused."""

TENSOR_OPTIONS = frozenset({"rho", "lr", "beta1", "beta2"})
"""The options that may be tensors on an accelerator, which kernels then read there."""

NONE = -1
"""In a form: there is no y."""
PERTURBATION = -2
"""In a form: y is the present perturbation, ``w - backup``."""


class Map(IntEnum):
    """What is done to each element of x before it is multiplied; ``scale`` and ``term`` are coefficients."""

    IDENTITY = 0
    POWER = 1
    """``sign(x) * |scale * x| ** term``, and 0 for 0."""
    ADAPTIVE = 2
    """``T^2 * x`` with ``T = scale * |w| + term``."""


class AscentForm(NamedTuple):
    """The compile-time part of an ascent ``w + A * map(x) + B * y``, for the parameters with a backup and an x."""

    x: Row = Row.GRAD
    y: int = NONE
    """A row; NONE; or PERTURBATION: a further ascent, which starts from the backup again."""
    map: Map = Map.IDENTITY


class DescentForm(NamedTuple):
    """The compile-time part of a descent by ``A * x + B * y``, where x is the gradient.

    It applies to the parameters that have x and every other tensor that the form names; the others keep their gradient.
    """

    y: int = NONE
    """A row, or NONE."""
    keeps: bool = False
    """``method_state <- KEEP_X * x + KEEP_FIRST * first_grad + KEEP_STATE * method_state``."""
    decoupled: bool = False
    """``w`` also moves by ``-(DECOUPLED_X * x + DECOUPLED_Y * y)``, outside the base update."""


class AscentCoefficients(IntEnum):
    """The columns of an ascent's coefficients, float64 ``(n, 4)``; a coefficient of 0 selects, it never multiplies."""

    A = 0
    B = 1
    SCALE = 2
    TERM = 3


class DescentCoefficients(IntEnum):
    """The columns of a descent's coefficients, float64 ``(n, 7)``; a coefficient of 0 selects, it never multiplies."""

    A = 0
    B = 1
    KEEP_X = 2
    KEEP_FIRST = 3
    KEEP_STATE = 4
    DECOUPLED_X = 5
    DECOUPLED_Y = 6


class Ascent(NamedTuple):
    """What ``perturb_`` does: by a norm (plain SAM), or by coefficients.

    By a norm, ``A = rho / (norm + 1e-12)`` is made in the kernel; by coefficients, only ``rounding_seed`` of the
    options counts.
    """

    options: Sequence[AscentOptions]
    """Of each parameter group."""
    norm: Tensor | None = None
    """Float64, 0-dim; None: by coefficients."""
    form: AscentForm = AscentForm()
    coefficients: Tensor | None = None
    """Float64 ``(n, 4)`` on the table's device."""


class Descent(NamedTuple):
    """What takes the gradient's place in ``restore_and_update_``."""

    form: DescentForm
    coefficients: Tensor
    """Float64 ``(n, 7)`` on the table's device."""


class Draw(IntEnum):
    """What random numbers are drawn for; each result of a parameter in a step has numbers of its own.

    Draws ``2 * k`` and ``2 * k + 1`` share a random word, of which the second turns the halves round: 16 bits decide
    nearly every rounding, and words are what random numbers cost.
    """

    ASCENT = 0
    WEIGHT = 2
    STATE = 3
    """The first of ``STATE_SLOTS``."""
    METHOD_STATE = 6


RANDOM_WORDS = 8
"""Random words reserved for each element of a parameter: those of parameter p begin at ``RANDOM_WORDS * p``."""


class StateNames(NamedTuple):
    """The tensors that a base update keeps for one parameter, under torch.optim's names."""

    moments: tuple[str, ...] = ()
    """One per state slot, of the parameter's shape and dtype (with master weights: float32)."""
    step: str | None = None
    """The 0-dim count of updates, where it is kept in the optimizer's state."""
    initial: float = 0.0
    """What fresh moments hold."""


MASTER_NAME, STEP_NAME = "fastsam_master", "fastsam_step"
