"""The SAM family, and parameter groups for SAM-ON.

Each method is a small class that turns dot products into the coefficients of two tensors (``method.py``); none launches
a kernel.
"""

from fastsam.methods.ascent import AMP, ASAM, AWP, SAM, MomentumSAM, RandomSAM
from fastsam.methods.averages import FriendlySAM, VaSSO
from fastsam.methods.descent import GSAM, SAGM, WSAM, LookSAM, StableSAM
from fastsam.methods.direction import Direction
from fastsam.methods.filters import ESAM, GCSAM, ZSharp
from fastsam.methods.lengths import LESAM, UnifiedSAM
from fastsam.methods.method import Method, check_method
from fastsam.methods.norm_layers import norm_layers_only
from fastsam.schedules import RhoByLR, RhoSchedule

__all__ = [
    "AMP",
    "ASAM",
    "AWP",
    "ESAM",
    "GCSAM",
    "GSAM",
    "LESAM",
    "SAGM",
    "SAM",
    "WSAM",
    "Direction",
    "FriendlySAM",
    "LookSAM",
    "Method",
    "MomentumSAM",
    "RandomSAM",
    "RhoByLR",
    "RhoSchedule",
    "StableSAM",
    "UnifiedSAM",
    "VaSSO",
    "ZSharp",
    "check_method",
    "norm_layers_only",
]
