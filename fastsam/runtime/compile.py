"""Keeps torch.compile away from the steps: Dynamo cannot trace what works on addresses."""

from __future__ import annotations

from typing import Any

import torch

# As torch.compiler.disable, but Dynamo, which takes seconds, is imported at the first call: as for torch.optim's own.
untraced: Any = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable
"""Decorates a function that a compiled training step calls as it is."""
