"""Methods in plain PyTorch: a function that gives the ascent's direction, everything else shared with SAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastsam.methods.method import TINY, AscentTerms, Dots, Facts, Method
from fastsam.spec import AscentForm, Row

DirectionFunction = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Direction(Method):
    r"""An ascent of one's own: ``e = rho * d / ||d||`` with ``d = fn(params, grads)``.

    The norm over all parameters, the perturbation, the exact restore, precision, accumulation and state are those of
    every other method, on every backend. Pass a function, or derive a class that has :meth:`direction`::

        def sign_only_matrices(params, grads):
            return [g.sign() if p.dim() > 1 else None for p, g in zip(params, grads)]

        optimizer = FastSAM(model.parameters(), method=methods.Direction(sign_only_matrices), rho=0.05, lr=0.1)

    Args:
        fn: called once per ascent, without grad, with the perturbed parameters that have a gradient (the user's own
            tensors) and their gradients, which it must not change. For each it returns a tensor of the parameter's
            shape on its device, or None: such a parameter is not perturbed.
    """

    fn: DirectionFunction | None = None

    def __post_init__(self) -> None:
        if self.fn is None and type(self).direction is Direction.direction:
            raise TypeError("Direction needs fn, a function of (params, grads), or a subclass with direction()")
        if self.fn is not None and not callable(self.fn):
            raise TypeError(f"fn must be a function of (params, grads), got {type(self.fn).__name__}")

    def direction(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The direction of each parameter; None: not perturbed."""
        assert self.fn is not None
        return self.fn(params, grads)

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm(x=Row.DIRECTION)

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        return AscentTerms(facts.rho / (dots.total[0].sqrt() + TINY))
