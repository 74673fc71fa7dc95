"""Excludes the steps from torch.compile: Dynamo cannot trace functions that work on addresses."""

from __future__ import annotations

from typing import Any

import torch

# Like torch.compiler.disable, but as in torch.optim, Dynamo is imported at the first call: the import takes seconds.
untraced: Any = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable
"""Decorates a function that a compiled training step calls without tracing it."""
