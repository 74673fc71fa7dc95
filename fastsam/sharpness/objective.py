"""The loss over some data as a function of the weights, with everything else about the model held still."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastsam import methods
from fastsam.distributed import is_distributed, whole_of
from fastsam.optimizer import FastSAM
from fastsam.runtime.parallel_models import ParallelModel
from fastsam.runtime.replay_rng import GeneratorStates
from fastsam.sharpness.ranks import Ranks
from fastsam.sharpness.vectors import Vector

LossFunction = Callable[..., Tensor]
HALF = (torch.float16, torch.bfloat16)


class Objective:
    """``L(w)``, its gradient, and ``w + e`` for given e.

    Args:
        model: its parameters that require gradients are ``w``. Half-precision models are measured on a float32 copy
            (the perturbations of interest are smaller than half a unit in the last place of most weights), with
            half-precision inputs cast to float32.
        loss_fn: ``loss_fn(model(input), target)``, the mean over a batch; or, where batches are mappings,
            ``loss_fn(model(**batch), batch)``. None if ``data`` is a closure.
        data: an iterable of batches that can be iterated over again and again: a DataLoader, a list. ``L`` is the mean
            over all samples. In distributed training each rank gives as many batches of its own, and ``L`` is over all
            ranks. Or a closure without arguments that returns the loss as a tensor; ``loss_fn`` is then None.
        train: measure in train mode: batch norm then uses each batch's statistics, and dropout draws masks. The same
            random numbers are used at every w, so that the same masks are compared. By default in eval mode.

    Attributes:
        params: ``w``.
        ranks: the ranks that hold the model.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction | None, data: Any, *, train: bool = False) -> None:
        _check_arguments(model, loss_fn, data)
        # FSDP keeps some unsharded weights after a forward pass: stale ones, and not the parameters that are perturbed.
        self._parallel = ParallelModel(model, local_ascent=False, method=methods.SAM())
        self._parallel.note_writes()
        params = [p for p in model.parameters() if p.requires_grad]
        if not params:
            raise ValueError("model has no parameter that requires a gradient: there is nothing to perturb")
        self._is_half = any(p.dtype in HALF for p in params)
        if self._is_half:
            model = _float_copy(model, params, is_closure=loss_fn is None)
            params = [p for p in model.parameters() if p.requires_grad]
        self.model, self.loss_fn, self.data, self.train = model, loss_fn, data, train
        self.params = params
        self.ranks = Ranks(model, params)
        # Only its exact perturbation is used: it never takes a step.
        self._optimizer = FastSAM(params, model=model, lr=0.0)

    # ---- what is held still ----

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A block for evaluations; at its end mode, buffers, gradients and random numbers are as before."""
        modes = [(module, module.training) for module in self.model.modules()]
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        grads = [p.grad for p in self.params]
        self._states = GeneratorStates(p.device for p in self.params)
        try:
            for param in self.params:
                param.grad = None
            self.model.train(self.train)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    buffer.copy_(before)
                    module._buffers[name] = buffer
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad
            self._states.restore()
            del self._states

    def at(self, displacement: Sequence[Tensor]) -> AbstractContextManager[None]:
        """A block with ``displacement`` added to ``w``."""
        return self._optimizer.perturb_by(displacement)

    # ---- evaluations ----

    def loss(self) -> float:
        """``L`` at the present weights."""
        with torch.no_grad():
            return self._sum_up(lambda loss, size: None)[0]

    def gradient(self) -> tuple[float, Vector]:
        """``L`` and its gradient at the present weights."""
        for param in self.params:
            param.grad = None
        with torch.enable_grad():
            loss, total = self._sum_up(lambda loss, size: (loss * size).backward())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        for param in self.params:
            param.grad = None
        # Data parallelism has divided by the number of ranks, and total is over all of them.
        grads = [(g.to_dense() if g.is_sparse else g) * (self.ranks.size / total) for g in grads]
        return loss, grads

    def product(self, vector: Sequence[Tensor]) -> Vector:
        """The Hessian of ``L`` at the present weights times a vector, by double backward."""
        result = [torch.zeros_like(p) for p in self.params]

        def add(loss: Tensor, size: float) -> None:
            grads = torch.autograd.grad(loss * size, self.params, create_graph=True, allow_unused=True)
            slope = sum((g * v).sum() for g, v in zip(grads, vector, strict=True) if g is not None)
            if not isinstance(slope, Tensor) or not slope.requires_grad:
                return  # the loss is linear in all parameters
            parts = torch.autograd.grad(slope, self.params, allow_unused=True)
            for mine, part in zip(result, parts, strict=True):
                if part is not None:
                    mine.add_(part)

        with torch.enable_grad():
            _, total = self._sum_up(add, unwrapped=True)
        return [self.ranks.sum(part) / total for part in result]

    def pieces(self, m: int | None) -> Iterator[tuple[Objective, float]]:
        """The batches' parts of at most ``m`` samples as objectives, with their sizes; None: the whole, once."""
        if m is None:
            yield self, 1.0
            return
        if self.loss_fn is None:
            raise ValueError(f"m={m} needs a model, a loss_fn and batches: a closure cannot be divided")
        self._states.restore()  # for a loader that shuffles
        for batch in self._batches():
            for start in range(0, _size_of(batch), m):
                part = copy.copy(self)
                part.data = [_rows(batch, start, start + m)]
                yield part, _size_of(part.data[0])

    def _sum_up(self, use: Callable[[Tensor, float], None], *, unwrapped: bool = False) -> tuple[float, float]:
        """Calls ``use`` with each batch's loss and size; returns the mean loss over all samples, and their number."""
        model = self.model
        if unwrapped and isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        sums = torch.zeros(2, dtype=torch.float64, device=self.params[0].device)

        def run() -> None:
            for batch in self._batches():
                loss, size = self._loss_of(model, batch)
                use(loss, size)
                sums.add_(torch.stack([loss.detach().double() * size, torch.full_like(sums[0], size)]))

        self._states.replayed(run)()
        self._parallel.note_writes()
        loss, size = self.ranks.sum(sums).tolist()
        if size == 0:
            raise ValueError("data is empty: it gave no batch")
        return loss / size, size

    def _batches(self) -> Iterable[Any]:
        return [None] if self.loss_fn is None else self.data

    def _loss_of(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        if self.loss_fn is None:
            loss, size = self.data(), 1.0
        else:
            batch = _moved(batch, self.params[0].device, self._is_half)
            inputs, target = _inputs_and_target(batch)
            output = model(**inputs) if isinstance(batch, Mapping) else model(inputs)
            loss, size = self.loss_fn(output, target), float(_size_of(batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"the loss must be a tensor of one element, got {type(loss).__name__}; use its mean")
        return whole_of(loss).reshape(()), size


def normalized_logits(loss_fn: LossFunction) -> LossFunction:
    """``loss_fn`` of logits that are centred and scaled to norm 1, so that their scale has no part in a measure.

    As in Andriushchenko et al., ICML 2023, https://arxiv.org/abs/2302.07011. A network whose logits are twice as large
    is sharper without being another classifier.
    """

    def normalized(logits: Tensor, target: Any) -> Tensor:
        centred = logits - logits.mean(dim=-1, keepdim=True)
        return loss_fn(centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-10), target)

    return normalized


def is_finite(loss: float) -> bool:
    """Whether ``L(w)`` is finite; warns if it is not."""
    if not math.isfinite(loss):
        warnings.warn(f"the loss at w is {loss}: no sharpness can be measured there", RuntimeWarning, stacklevel=3)
    return math.isfinite(loss)


def _check_arguments(model: Any, loss_fn: Any, data: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if loss_fn is None:
        if not callable(data):
            raise TypeError(
                f"without a loss_fn, data must be a closure that returns the loss, got {type(data).__name__}"
            )
        return
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (output, target), got {type(loss_fn).__name__}")
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}; a closure needs loss_fn=None")
    if isinstance(data, Iterator):
        raise TypeError(f"data is read several times, and a {type(data).__name__} only once: pass a DataLoader or list")


def _float_copy(model: nn.Module, params: Sequence[Tensor], *, is_closure: bool) -> nn.Module:
    why = "a half-precision model is measured on a float32 copy"
    if is_closure:
        raise ValueError(f"{why}, which a closure does not use; pass model, loss_fn and data")
    if any(map(is_distributed, params)):
        raise ValueError(f"{why}, which a sharded model has not; keep its parameters in float32 (MixedPrecisionPolicy)")
    return copy.deepcopy(model).float()


def _inputs_and_target(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        return batch, batch
    if isinstance(batch, Sequence) and len(batch) == 2:
        return batch[0], batch[1]
    what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sequence) else type(batch).__name__
    raise TypeError(f"a batch must be (input, target) or a mapping, got a {what}; use a closure for others")


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor in it changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(_mapped(value, change) for value in batch)
    return batch


def _moved(batch: Any, device: torch.device, to_float: bool) -> Any:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, torch.float32 if to_float and tensor.dtype in HALF else None)

    return _mapped(batch, move)


def _rows(batch: Any, start: int, stop: int) -> Any:
    return _mapped(batch, lambda tensor: tensor[start:stop] if tensor.dim() else tensor)


def _size_of(batch: Any) -> int:
    """The number of samples: the length of the first tensor."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.dim()), 1)
