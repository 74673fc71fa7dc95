"""The demo's data: scikit-learn's bundled scans of digits, with wrong training labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_SIZE = 900
CLASSES = 10


@dataclass(frozen=True)
class NoisyDigits:
    """One split of the 1,797 scans. Images are float32 of shape (n, 1, 8, 8) in [0, 1], labels int64 of shape (n,)."""

    train_images: Tensor
    train_labels: Tensor
    true_train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def mislabelled(self) -> Tensor:
        """Which training labels are wrong, as a mask."""
        return self.train_labels != self.true_train_labels


def load_noisy_digits(noise: float, seed: int, device: torch.device | str = "cpu") -> NoisyDigits:
    """Splits the digits into 900 for training and 897 for testing, and replaces a share of the training labels.

    Args:
        noise: exactly ``round(noise * 900)`` training labels are replaced by one of the nine *other* labels, chosen
            uniformly (symmetric noise), so that a replaced label is always wrong. Test labels are not changed.
        seed: of the split, of the choice of labels, and of their replacements.
        device: the tensors' device.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)

    generator = torch.Generator().manual_seed(seed)
    train, test = torch.randperm(len(labels), generator=generator).split([TRAIN_SIZE, len(labels) - TRAIN_SIZE])
    true_labels = labels[train]
    replaced = torch.randperm(TRAIN_SIZE, generator=generator)[: round(noise * TRAIN_SIZE)]
    shift = torch.randint(1, CLASSES, replaced.shape, generator=generator)
    noisy_labels = true_labels.clone()
    noisy_labels[replaced] = (true_labels[replaced] + shift) % CLASSES
    tensors = (images[train], noisy_labels, true_labels, images[test], labels[test])
    return NoisyDigits(*(tensor.to(device) for tensor in tensors))
