"""What a method of the SAM family is: dot products in, coefficients of two tensors out. The defaults are plain SAM's.

A method knows no backend and no table: it names forms (``fastsam/spec.py``) and computes their coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fastsam.spec import AscentForm, DescentForm

TINY = 1e-12
"""Added to every norm that something is divided by, as in SAM."""

Number = Tensor | float
"""One number for all parameters, or float64 ``(n,)``."""


class AscentTerms(NamedTuple):
    """The coefficients of ``w + a * map(x) + b * y``, in the order of :class:`fastsam.spec.AscentCoefficients`."""

    a: Number = 0.0
    b: Number = 0.0
    scale: Number = 0.0
    term: Number = 0.0


class DescentTerms(NamedTuple):
    """The coefficients of a descent by ``a * x + b * y``, in the order of :class:`fastsam.spec.DescentCoefficients`.

    The defaults leave the gradient and the method state as they are.
    """

    a: Number = 1.0
    b: Number = 0.0
    keep_x: Number = 0.0
    keep_first: Number = 0.0
    keep_state: Number = 1.0
    decoupled_x: Number = 0.0
    decoupled_y: Number = 0.0


class Facts:
    """What a method may ask about a table's parameters: float64 ``(n,)`` on the table's device, made when asked for."""

    step: int
    """The number of the step, from 0."""
    ascent: Dots | None
    """In a descent: the dots of the step's last ascent, if it had some."""

    def __init__(
        self,
        step: int,
        rho: Callable[[], Tensor],
        lr: Callable[[], Tensor],
        matrix: Callable[[], Tensor],
        uniform: Callable[[int, int], Tensor],
        ascent: Dots | None = None,
    ) -> None:
        self.step, self.ascent = step, ascent
        self._make_rho, self._make_lr, self._make_matrix, self._draw = rho, lr, matrix, uniform

    @property
    def rho(self) -> Tensor:
        """Of each parameter's group; negative where the base maximizes."""
        return self._make_rho()

    @property
    def lr(self) -> Tensor:
        """Of each parameter's group; negative where the base maximizes."""
        return self._make_lr()

    @property
    def matrix(self) -> Tensor:
        """1 for a parameter of two and more dimensions, else 0 (biases, and the weights of normalisation layers)."""
        return self._make_matrix()

    def uniform(self, seed: int) -> Tensor:
        """A random number in [0, 1) for each parameter, by seed, step and the parameter's position in the groups."""
        return self._draw(seed, self.step)


class Dots(NamedTuple):
    """Float64: ``<map(x), x>, <x, y>, <y, y>``."""

    total: Tensor
    """``(3,)``: over all parameters of the optimizer that take part."""
    each: Tensor
    """``(n, 3)``: of each parameter of one table; see ``reads_each_dot``."""


@dataclass(frozen=True)
class Method:
    """What the engine asks a method. The defaults are SAM's; without a form, the gradient itself is used."""

    needs_first_pass: ClassVar[bool] = True
    """Whether the ascent needs the gradient at w; if not, it comes before the only pass of the step."""
    needs_first_grads: ClassVar[bool] = False
    """Whether the descent needs the first pass's gradients."""
    depends_on_length: ClassVar[bool] = True
    """Whether a step depends on the length of the first pass's gradients; False: on their direction alone."""
    state_name: ClassVar[str | None] = None
    """The name in ``state`` of what is kept from step to step; descents that keep it also do so without an ascent."""
    reads_each_dot: ClassVar[bool] = False
    """Whether the formulas read ``Dots.each``; if not, sharded parameters' are those of the local shards."""
    uses_shapes: ClassVar[bool] = False
    """Whether a parameter's shape matters: flat shards of it will not do."""
    counts_steps: ClassVar[bool] = False
    """Whether the number of the step matters."""

    @property
    def allows_local_ascent(self) -> bool:
        """Whether ranks may ascend by different gradients: only ``e`` depends on the first pass."""
        own_descent = self.needs_first_grads or self.descent_form(ascended=True) is not None
        return self.needs_first_pass and not own_descent and self.state_name is None

    @property
    def why_no_micro_batches(self) -> str:
        """Why a step cannot have an ascent for each micro-batch and the average of their gradients; empty if it can."""
        form = self.descent_form(ascended=True)
        if not self.needs_first_pass:
            return "whose ascent depends on no gradient and is the same for each micro-batch: accumulate gradients"
        if self.state_name is not None:
            return "whose state is made of the step's one gradient at w"
        if form is not None and form.decoupled:
            return "whose decoupled part is no gradient that could be averaged; use decouple=False"
        return ""

    @property
    def ascents(self) -> int:
        """How many ascent steps a step has; each one by a gradient is one more pass."""
        return 1

    def ascends(self, step: int) -> bool:
        """Whether step ``step`` (from 0) has an ascent at all; if not, it is one pass."""
        return True

    def check_group(self, base: type, group: Mapping[str, Any], *, fused: bool) -> None:
        """Raises ValueError if the method cannot work with a parameter group over ``base``.

        Args:
            base: the base optimizer's class.
            group: the parameter group.
            fused: whether the base update runs fused with the restore.
        """
        if group["adaptive"] and self.ascent_form(further=False) is not None:
            raise ValueError(
                f"adaptive=True changes SAM's own perturbation, and {self} defines another one; see methods.ASAM"
            )

    def noise_seed(self) -> int | None:
        """The seed of a direction drawn from N(0, I), for methods that ascend by one (their x is DIRECTION)."""
        return None

    def direction(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor | None] | None:
        """The direction of the ascent in plain PyTorch, for methods whose x is DIRECTION; see :class:`Direction`."""
        return None

    @property
    def has_direction(self) -> bool:
        """Whether :meth:`direction` gives the ascent's direction."""
        return type(self).direction is not Method.direction

    def ascent_form(self, further: bool) -> AscentForm | None:
        """The ascent's form; None: plain SAM. ``further``: the weights are perturbed already."""
        return None

    def map_terms(self, facts: Facts) -> AscentTerms:
        """The coefficients that the dots need: ``scale`` and ``term`` of the form's map."""
        return AscentTerms()

    def weigh(self, dots: Tensor, facts: Facts) -> Tensor:
        """The ``(n, 3)`` dots as they are to be added up over all parameters."""
        return dots

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        """The coefficients of ``e``."""
        raise NotImplementedError

    def descent_form(self, ascended: bool) -> DescentForm | None:
        """The descent's form; None: the gradient. ``ascended``: there was an ascent in this step."""
        return None

    def measures(self, ascended: bool) -> bool:
        """Whether the descent needs dots."""
        return False

    def descent_terms(self, dots: Dots, facts: Facts, ascended: bool) -> DescentTerms:
        """The coefficients of what the base is given in the gradient's place."""
        raise NotImplementedError


def check_method(method: Any) -> None:
    """Raises TypeError if ``method`` is no method."""
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method must be an instance: methods.{method.__name__}()")
    if not isinstance(method, Method):
        raise TypeError(f"method must be one of fastsam.methods, got {type(method).__name__}")
