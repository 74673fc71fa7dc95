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


class TransformerBlock(nn.Module):
    """Attention and an MLP, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., 2021); by default ViT-B/16 at 224 x 224, 86,567,656 parameters."""

    def __init__(
        self, image: int = 224, patch: int = 16, width: int = 768, depth: int = 12, heads: int = 12, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class LanguageModel(nn.Module):
    """Four blocks over 64 tokens, each of which has a target."""

    def __init__(self, vocabulary: int = 1000, width: int = 256, length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.position)).transpose(1, 2)


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
TRANSFORMER = Network("transformer", LanguageModel, "AdamW", batch=8, image=None, convolutional=False)
VIT = Network("ViT-B/16", VisionTransformer, "AdamW", batch=64, image=224, convolutional=False)

TINY = (
    Network("tiny WRN", lambda: WideResNet(10, 1), "SGD", batch=2),
    Network("tiny CNN", lambda: SmallCNN((4, 8)), "SGD", batch=2),
    Network("tiny ViT", lambda: VisionTransformer(32, 16, 8, 2, 2, 10), "AdamW", batch=2, convolutional=False),
)
