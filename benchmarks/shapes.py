"""The parameters of real models, in the shapes and order that torchvision, timm and transformers give them."""

from __future__ import annotations

import math

Shapes = list[tuple[int, ...]]


def _resnet(blocks: tuple[int, ...], *, bottleneck: bool) -> Shapes:
    """``torchvision.models.resnet18`` or ``resnet50``."""
    expansion = 4 if bottleneck else 1
    shapes: Shapes = [(64, 3, 7, 7), *_norm(64)]
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        outputs = width * expansion
        for block in range(count):
            if bottleneck:
                convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            else:
                convolutions = [(width, inputs, 3, 3), (width, width, 3, 3)]
            if block == 0 and (stage > 0 or inputs != outputs):
                convolutions.append((outputs, inputs, 1, 1))
            shapes += [shape for weight in convolutions for shape in (weight, *_norm(weight[0]))]
            inputs = outputs
    return [*shapes, *_linear(1000, inputs)]


def _wide_resnet_28_10() -> Shapes:
    """WRN-28-10 for CIFAR-10 (Zagoruyko and Komodakis, 2016; xternalz/WideResNet-pytorch)."""
    shapes: Shapes = [(16, 3, 3, 3)]
    inputs = 16
    for stage in range(3):
        outputs = 160 * 2**stage
        for layer in range(4):
            shapes += [*_norm(inputs), (outputs, inputs, 3, 3), *_norm(outputs), (outputs, outputs, 3, 3)]
            shapes += [(outputs, inputs, 1, 1)] if layer == 0 else []
            inputs = outputs
    return [*shapes, *_norm(inputs), *_linear(10, inputs)]


def _vit_b_16() -> Shapes:
    """``vit_base_patch16_224`` of timm."""
    width = 768
    attention, mlp = (
        (*_linear(3 * width, width), *_linear(width, width)),
        (*_linear(4 * width, width), *_linear(width, 4 * width)),
    )
    block = [*_norm(width), *attention, *_norm(width), *mlp]
    return [
        (1, 1, width),
        (1, 197, width),
        (width, 3, 16, 16),
        (width,),
        *12 * block,
        *_norm(width),
        *_linear(1000, width),
    ]


def _gpt2_small() -> Shapes:
    """``GPT2LMHeadModel``, whose head shares the embedding; its linear layers store their weights transposed."""
    width = 768
    block = [*_norm(width), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [*_norm(width), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *12 * block, *_norm(width)]


def _llama_1b() -> Shapes:
    """``LlamaForCausalLM`` as in Llama 3.2 1B, whose head shares the embedding."""
    width, key_value, hidden = 2048, 512, 8192
    attention: Shapes = [(width, width), (key_value, width), (key_value, width), (width, width)]
    block: Shapes = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(128256, width), *16 * block, (width,)]


def _adapters() -> Shapes:
    """LoRA of rank 8 on the projections q and v of Llama 1B, as peft makes it."""
    return 16 * [(8, 2048), (2048, 8), (8, 2048), (512, 8)]


def _linear(outputs: int, inputs: int) -> Shapes:
    return [(outputs, inputs), (outputs,)]


def _norm(width: int) -> Shapes:
    return [(width,), (width,)]


MODELS: dict[str, Shapes] = {
    # Memory bandwidth and nothing else; the cost of a tensor and nothing else.
    "4 x 4096^2": 4 * [(4096, 4096)],
    "2,000 x 256": 2000 * [(256,)],
    "ResNet-18": _resnet((2, 2, 2, 2), bottleneck=False),
    "ResNet-50": _resnet((3, 4, 6, 3), bottleneck=True),
    "WRN-28-10": _wide_resnet_28_10(),
    "ViT-B/16": _vit_b_16(),
    "GPT-2 small": _gpt2_small(),
    "Llama 1B": _llama_1b(),
    "adapters": _adapters(),
}
# A rehearsal's, which no figure is about.
TINY = "tiny"
TINY_SHAPES: Shapes = [(7, 40), (7,)]


def shapes_of(model: str) -> Shapes:
    return TINY_SHAPES if model == TINY else MODELS[model]


def sizes(model: str) -> dict[str, int | str]:
    """What every record says of a model."""
    shapes = shapes_of(model)
    return {"model": model, "parameters": sum(map(math.prod, shapes)), "tensors": len(shapes)}
