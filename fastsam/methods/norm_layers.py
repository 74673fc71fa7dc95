"""Parameter groups in which only normalisation layers are perturbed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def norm_layers_only(
    model: nn.Module, kinds: tuple[type[nn.Module], ...] = (), *, bias: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """Parameter groups for SAM-ON: only the parameters of normalisation layers are perturbed.

    Mueller et al., NeurIPS 2023, https://arxiv.org/abs/2306.04226. As in the authors' code, weights and biases are.

    Args:
        model: the model.
        kinds: the classes of the layers whose parameters are perturbed; else torch's normalisation layers, and every
            class whose name ends in ``Norm``.
        bias: whether their biases are perturbed, too.
        **options: of both groups.

    Returns:
        The perturbed group, and all other parameters with ``perturb=False``.

    Raises:
        ValueError: the model has no such layer with a weight.
    """
    perturbed: dict[Tensor, None] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and (isinstance(module, kinds) if kinds else _is_norm_layer(module)):
            perturbed[weight] = None
            offset = getattr(module, "bias", None)
            if bias and isinstance(offset, Tensor):
                perturbed[offset] = None
    if not perturbed:
        raise ValueError("model has no normalisation layer with a weight; name the classes (kinds=)")
    others = [p for p in model.parameters() if p not in perturbed]
    groups = [{"params": list(perturbed), **options}, {"params": others, "perturb": False, **options}]
    return groups if others else groups[:1]


_NORM_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def _is_norm_layer(module: nn.Module) -> bool:
    return isinstance(module, _NORM_LAYERS) or type(module).__name__.endswith("Norm")
