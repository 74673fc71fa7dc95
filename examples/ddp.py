"""DistributedDataParallel with per-rank ascents: one gradient all-reduce per step, as many as SGD has.

    torchrun --nproc-per-node=2 examples/ddp.py

With `local_ascent=True` each rank perturbs by the gradient of its own batch, as in the SAM paper's experiments on
several accelerators ("m-sharpness", m being a rank's batch size); gradients are averaged in the second pass only.
Without the option both passes average, and all ranks perturb alike. Needs scikit-learn.
"""

import os

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastsam import FastSAM
from fastsam.demo.data import load_noisy_digits
from fastsam.demo.model import make_cnn

BATCH_SIZE = 16  # of each rank


def train(device, *, epochs=5, local_ascent=True):
    """Trains on digits with wrong labels; returns the model and its accuracy."""
    data = load_noisy_digits(noise=0.4, seed=0)
    model = DistributedDataParallel(make_cnn(seed=0).to(device))
    options = {"rho": 0.2, "lr": 3e-3 * dist.get_world_size(), "momentum": 0.9}
    optimizer = FastSAM(model.parameters(), model=model, local_ascent=local_ascent, **options)
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        usable = len(order) // (BATCH_SIZE * dist.get_world_size()) * BATCH_SIZE * dist.get_world_size()
        for batch in order[:usable][dist.get_rank() :: dist.get_world_size()].split(BATCH_SIZE):

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                loss.backward()
                return loss

            optimizer.step(closure)
    model.eval()
    with torch.no_grad():
        right = model(data.test_images.to(device)).argmax(dim=1) == data.test_labels.to(device)
    return model, right.float().mean().item()


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    _, accuracy = train(device)
    if dist.get_rank() == 0:
        print(f"test accuracy {accuracy:.1%}")
    dist.destroy_process_group()
