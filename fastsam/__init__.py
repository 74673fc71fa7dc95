"""FastSAM: Sharpness-Aware Minimization as fused multi-tensor operations, a drop-in torch.optim.Optimizer."""

from importlib.metadata import PackageNotFoundError, version

from fastsam import methods, schedules
from fastsam.backends import BackendUnavailable
from fastsam.closures import functional_sam_closures
from fastsam.optimizer import FastSAM

try:
    __version__ = version("fastsam-optim")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["BackendUnavailable", "FastSAM", "__version__", "functional_sam_closures", "methods", "schedules"]
