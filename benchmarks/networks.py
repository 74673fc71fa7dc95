"""The models of the whole training steps, written out: what they compute is what counts, not how well they learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SmallCNN(nn.Sequential):
    """Six convolutions with batch norm for small images: on a GPU a step of it is launches and little else."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            for stride in (1, 2):
                convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class WideBlock(nn.Module):
    """Batch norm, ReLU, convolution, twice, beside a shortcut (Zagoruyko and Komodakis, 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-``depth``-``widening`` for images of 32 x 32; WRN-28-10 has 36,479,194 parameters."""

    def __init__(self, depth: int = 28, widening: int = 10, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks, inputs = [], 16
        for stage in range(3):
            outputs = 16 * widening * 2**stage
            for block in range((depth - 4) // 6):
                blocks.append(WideBlock(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.blocks(self.conv1(x))))
        return self.fc(out.mean((2, 3)))


class Transformer(nn.Module):
    """Encoder blocks over ``length`` embedded tokens, a head after them.

    With a ``patch`` they are patches of images, averaged before the head (Dosovitskiy et al., 2021, without the class
    token); with a ``vocabulary`` they are words.
    """

    def __init__(
        self, length: int, width: int, depth: int, heads: int, outputs: int, *, patch: int = 0, vocabulary: int = 0
    ) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(3, width, patch, patch) if patch else nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding(x)
        if tokens.dim() == 4:
            return self.head(self.encoder(tokens.flatten(2).transpose(1, 2) + self.position).mean(1))
        return self.head(self.encoder(tokens + self.position)).transpose(1, 2)


class Network(NamedTuple):
    """What is trained, and on what.

    Attributes:
        build: makes the model.
        base: one of ``BASES``.
        batch: how many examples.
        image: their height and width; None: 64 tokens.
        convolutional: kept in channels-last memory on a GPU.
    """

    name: str
    build: Callable[[], nn.Module]
    base: str
    batch: int
    image: int | None = 32
    convolutional: bool = True

    def examples(self, device_type: str) -> tuple[Tensor, Tensor]:
        """Random inputs and targets."""
        if self.image is None:
            return tuple(torch.randint(1000, (self.batch, 64), device=device_type) for _ in range(2))
        images = torch.randn(self.batch, 3, self.image, self.image, device=device_type)
        return self.on(images), torch.randint(10, (self.batch,), device=device_type)

    def on(self, value: nn.Module | Tensor) -> nn.Module | Tensor:
        """A model or images in the memory format that its device likes."""
        is_on_gpu = (value if isinstance(value, Tensor) else next(value.parameters())).is_cuda
        return value.to(memory_format=torch.channels_last) if self.convolutional and is_on_gpu else value


WRN = Network("WRN-28-10", WideResNet, "SGD", batch=128)
CNN = Network("CNN", SmallCNN, "SGD", batch=64)
TRANSFORMER = Network(
    "transformer",
    lambda: Transformer(64, 256, 4, 4, 1000, vocabulary=1000),
    "AdamW",
    8,
    image=None,
    convolutional=False,
)
VIT = Network(
    "ViT-B/16", lambda: Transformer(196, 768, 12, 12, 1000, patch=16), "AdamW", 64, image=224, convolutional=False
)
TINY_NETWORKS = (
    Network("tiny WRN", lambda: WideResNet(10, 1), "SGD", batch=2),
    Network("tiny CNN", lambda: SmallCNN((4, 8)), "SGD", batch=2),
    Network("tiny ViT", lambda: Transformer(4, 8, 2, 2, 10, patch=16), "AdamW", batch=2, convolutional=False),
)
