"""Mixed precision on noisy digits: float16 with a GradScaler, or bfloat16 without one.

    python examples/mixed_precision.py float16 --device cpu

The weights stay float32; autocast runs the layers in the lower precision. Needs scikit-learn.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

from fastsam import FastSAM
from fastsam.demo.data import load_noisy_digits

BATCH_SIZE = 50
CLIP = 1.0


def float16_step(model, optimizer, scaler, images, labels):
    """torch's AMP loop, preceded by a first phase. The scale keeps small float16 gradients from underflow."""
    device = images.device.type
    optimizer.zero_grad()
    with torch.autocast(device, torch.float16):
        loss = F.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    optimizer.first_step()  # does not depend on the scale; after an overflow it perturbs nothing

    with torch.autocast(device, torch.float16):
        perturbed_loss = F.cross_entropy(model(images), labels)
    scaler.scale(perturbed_loss).backward()
    scaler.unscale_(optimizer)  # needed for clipping
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    scaler.step(optimizer)  # restores the weights, and updates them unless a gradient has overflowed
    scaler.update()
    return loss


def bfloat16_step(model, optimizer, images, labels):
    """bfloat16 has float32's range: no scaler is needed. Both passes may be in one autocast block."""

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        return loss

    with torch.autocast(images.device.type, torch.bfloat16):
        return optimizer.step(closure)


def train(dtype, *, device="cpu", epochs=10, backend="auto", init_scale=2.0**16):
    """Returns the model, the accuracy on the test digits, and the scaler (None for bfloat16)."""
    data = load_noisy_digits(noise=0.4, seed=0, device=device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    optimizer = FastSAM(model.parameters(), rho=0.2, lr=0.05, momentum=0.9, backend=backend)
    scaler = torch.amp.GradScaler(device, init_scale=init_scale) if dtype == torch.float16 else None
    for epoch in range(epochs):
        for batch in torch.randperm(len(data.train_labels), device=device).split(BATCH_SIZE):
            images, labels = data.train_images[batch], data.train_labels[batch]
            if scaler is not None:
                loss = float16_step(model, optimizer, scaler, images, labels)
            else:
                loss = bfloat16_step(model, optimizer, images, labels)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    with torch.no_grad():
        right = model(data.test_images).argmax(1) == data.test_labels
    return model, right.float().mean().item(), scaler


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dtype", choices=["float16", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    _, accuracy, _ = train(getattr(torch, arguments.dtype), device=arguments.device)
    print(f"{100 * accuracy:.1f}% test accuracy, trained with 40% wrong labels")
