"""The SAM family, and parameter groups for SAM-ON.

Each method is a small class that turns dot products into the coefficients of two tensors (``method.py``); none launches
a kernel.
"""

from fastsam.methods.ascent import AMP, ASAM, AWP, SAM, MomentumSAM, RandomSAM
from fastsam.methods.descent import GSAM, WSAM, FriendlySAM, LookSAM
from fastsam.methods.direction import Direction
from fastsam.methods.method import Method, check_method
from fastsam.methods.norm_layers import norm_layers_only
from fastsam.schedules import RhoByLR, RhoSchedule

__all__ = [
    "AMP",
    "ASAM",
    "AWP",
    "GSAM",
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
    "check_method",
    "norm_layers_only",
]
