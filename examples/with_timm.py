"""timm on noisy digits: a ViT, FastSAM by its name, a schedule, a scaler, clipping.

pip install timm scikit-learn
python examples/with_timm.py
"""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import NativeScaler
from torch.nn import functional as F

from fastsam.demo.data import load_noisy_digits
from fastsam.integrations.timm import SAMBackward, register


def train(epochs=60, device="cpu"):
    """Returns the accuracy on the test digits."""
    torch.manual_seed(0)
    data = load_noisy_digits(noise=0.4, seed=0, device=device)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes).to(device)

    register()
    options = {"lr": 3e-3, "weight_decay": 0.05, "layer_decay": 0.9}
    optimizer = create_optimizer_v2(model, "fastsam", base=torch.optim.AdamW, rho=0.05, **options)
    schedule = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=2, warmup_lr_init=3e-4)
    backward = SAMBackward(optimizer, NativeScaler(device) if device == "cuda" else None)

    def loss_fn(images, labels):
        with torch.autocast(device, torch.float16, enabled=device == "cuda"):
            return F.cross_entropy(model(images), labels)

    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(data.train_labels), device=device).split(50):
            images, labels = data.train_images[batch], data.train_labels[batch]
            loss = backward(loss_fn, images, labels, clip_grad=1.0)  # both passes and the update
            optimizer.zero_grad()
        schedule.step(epoch + 1)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        return (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()


if __name__ == "__main__":
    accuracy = train(device="cuda" if torch.cuda.is_available() else "cpu")
    print(f"{100 * accuracy:.1f}% test accuracy, trained with 40% wrong labels")
