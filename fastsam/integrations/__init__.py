"""FastSAM in other libraries' training loops: one module per library, which imports that library.

Import the module that you need, such as :mod:`fastsam.integrations.lightning`; ``import fastsam`` imports none of them.
"""

from __future__ import annotations

from torch.optim import Optimizer

from fastsam.optimizer import FastSAM

# Of Accelerate, Lightning, Fabric and DeepSpeed; of fastai; of timm's Lookahead.
_INNER = ("optimizer", "opt", "_base_optimizer")


def unwrap(optimizer: object) -> FastSAM:
    """Returns the FastSAM optimizer inside other libraries' wrappers.

    Raises:
        TypeError: there is none.
    """
    inner: object | None = optimizer
    while inner is not None:
        # A wrapper may inherit from FastSAM: only an optimizer without another one inside is FastSAM itself.
        optimizer = inner
        found = (getattr(optimizer, name, None) for name in _INNER)
        inner = next((each for each in found if isinstance(each, Optimizer)), None)
    if not isinstance(optimizer, FastSAM):
        raise TypeError(f"the optimizer must be FastSAM, got {type(optimizer).__name__}")
    return optimizer
