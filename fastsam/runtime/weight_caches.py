"""Caches of what was computed from weights, which change between the passes."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize


def clear_weight_caches() -> None:
    """Clears autocast's cache and that of ``torch.nn.utils.parametrize.cached()``."""
    torch.clear_autocast_cache()
    if parametrize._cache:
        parametrize._cache.clear()
