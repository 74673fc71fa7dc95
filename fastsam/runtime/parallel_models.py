"""Modules that run a model on several ranks: DDP's local first passes, FSDP2's copies of weights that go stale."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastsam.runtime.zero import OthersWeights

if TYPE_CHECKING:
    from fastsam.engine import Engine
    from fastsam.methods import Method


class ParallelModel:
    """What a step has to do about the module that ``model=`` names.

    Args:
        model: the outermost module, as the closures call it; None: nothing is done.
        local_ascent: first passes leave their gradients on their ranks.
        method: the method, which must allow that.
        zero: the ZeroRedundancyOptimizer around the optimizer, or None.
    """

    def __init__(self, model: nn.Module | None, local_ascent: bool, method: Method, zero: Any = None) -> None:
        if not isinstance(local_ascent, bool):
            raise TypeError(f"local_ascent must be True or False, got {local_ascent!r}")
        if local_ascent:
            _check_local_ascent(model, method)
            if zero is not None:
                raise ValueError(
                    "local_ascent=True is not possible inside of ZeroRedundancyOptimizer: each rank would perturb its "
                    "part of the weights by another batch; turn it round: FastSAM(params, ZeroRedundancyOptimizer, ...)"
                )
        self._model, self.local_ascent = model, local_ascent
        self._has_synchronized = False
        self._others_weights = None if zero is None else OthersWeights(zero)

    # ---- DDP ----

    def locally(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A first pass's closure: with ``local_ascent``, its gradients are not averaged over the ranks."""
        if not self.local_ascent:
            return closure

        def run() -> Any:
            ddp: Any = self._model
            # A static graph is recorded in the first pass of all, which must therefore be an ordinary one.
            if ddp.static_graph and not self._has_synchronized:
                self._has_synchronized = True
                return closure()
            with ddp.no_sync():
                return closure()

        return run

    # ---- whatever the module is ----

    def note_ascent(self) -> None:
        """This rank's weights have been perturbed."""
        if self._others_weights is not None:
            self._others_weights.receive()
        self.note_writes()

    def note_restore(self) -> None:
        """This rank's weights are back, without an update."""
        if self._others_weights is not None:
            self._others_weights.restore()
        self.note_writes()

    def clear_others_grads(self) -> None:
        """This rank's gradients have been cleared between two passes."""
        if self._others_weights is not None:
            self._others_weights.clear_grads()

    def note_update(self) -> None:
        """This rank's weights have been updated."""
        if self._others_weights is not None:
            self._others_weights.discard()
        self.note_writes()

    # ---- FSDP2 ----

    def note_writes(self) -> None:
        """The weights have been written to: frees unsharded copies of them, which a forward pass would go on using.

        FSDP keeps such copies with ``set_reshard_after_backward(False)`` or ``reshard_after_forward=False``.
        """
        if self._model is not None:
            for module in self._fsdp_modules():
                module.reshard()

    def watch_events(self, engine: Engine) -> None:
        """Lets the second pass's all-gathers wait for the ascent, whatever event the user has set.

        ``set_post_optim_event`` takes the event that they wait for, in place of the current stream. In the second pass
        it may be one that was recorded before the ascent.
        """
        root = self._model
        if root is None or not hasattr(root, "set_post_optim_event"):
            return

        reference = weakref.ref(engine)

        def forget_event(module: Any, _: Any) -> None:
            mine = reference()
            if mine is not None and mine.perturbed:
                module.set_post_optim_event(None)

        root.register_forward_pre_hook(forget_event, prepend=True)  # before FSDP's own

    def check_first_pass(self) -> None:
        """Raises RuntimeError if FSDP has kept the first pass's gradients, to add them to the second pass's."""
        for module in self._fsdp_modules():
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            for group in groups:
                if any(map(_has_kept_grad, getattr(group, "fsdp_params", ()))):
                    raise RuntimeError(
                        "FSDP has not reduced the first pass's gradients (set_requires_gradient_sync(False)) and would "
                        "add them to the second pass's; call model.set_requires_gradient_sync(True) before the last "
                        "backward of each pass. After this error call model.reset_iter_state()"
                    )

    def abandon_pass(self) -> None:
        """After an exception: discards what FSDP had begun, where torch has a function for that."""
        reset: Any = getattr(self._model, "reset_iter_state", None)
        if reset is not None:
            with suppress(RuntimeError):  # not the root
                reset()
        self.note_writes()

    def _fsdp_modules(self) -> list[Any]:
        if self._model is None:
            return []
        fsdp = sys.modules.get("torch.distributed.fsdp")
        kind = getattr(fsdp, "FSDPModule", None)
        if kind is None:
            return []
        return [module for module in self._model.modules() if isinstance(module, kind)]


def _has_kept_grad(param: Any) -> bool:
    """Whether FSDP has a gradient of a parameter that it has not reduced."""
    unsharded = getattr(param, "_unsharded_param", None)
    grad = None if unsharded is None else unsharded.grad
    return grad is not None or getattr(param, "unsharded_accumulated_grad", None) is not None


def _check_local_ascent(model: nn.Module | None, method: Method) -> None:
    """Raises ValueError if first passes cannot leave their gradients on their ranks."""
    if not method.allows_local_ascent:
        raise ValueError(
            f"local_ascent=True is not possible with {method}: what a rank alone knows of the first pass would enter "
            "the update, its state or a decision, and the replicas would part"
        )
    if isinstance(model, DistributedDataParallel):
        return
    if hasattr(model, "set_requires_gradient_sync"):
        raise ValueError(
            "local_ascent=True is not possible with fully_shard (FSDP2): a rank has a shard of the weights and could "
            "not perturb the rest by a gradient of its own. Between the replicas of HSDP it would be, but "
            "set_requires_all_reduce(False) does not give the reduced gradient out"
        )
    raise ValueError(
        "local_ascent=True needs model=, the DistributedDataParallel module that the closure calls, got "
        f"{type(model).__name__}"
    )
