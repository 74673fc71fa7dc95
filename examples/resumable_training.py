"""Training that may be killed at any moment: after a restart it resumes from its last checkpoint, bit for bit.

    python examples/resumable_training.py run.pt     # kill -9 and start it again as often as you like

A checkpoint holds everything that the next step depends on: the weights and batch-norm statistics, the optimizer's
state, the schedule, the state of torch's generator and the step. The order of the batches depends on the epoch only.
Checkpoints are made between steps: `optimizer.state_dict()` raises while the weights are perturbed. Needs scikit-learn.
"""

import os
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from fastsam import FastSAM
from fastsam.demo.data import load_noisy_digits
from fastsam.demo.model import make_cnn

BATCH_SIZE = 16


def train(path, *, steps=1000, save_every=50, backend="auto"):
    """Trains up to step `steps`, from the checkpoint at `path` if there is one; the last checkpoint is the result."""
    data = load_noisy_digits(noise=0.4, seed=0)
    model = make_cnn(seed=0)
    optimizer = FastSAM(model.parameters(), rho=0.2, lr=3e-3, momentum=0.9, model=model, backend=backend)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    torch.manual_seed(0)
    done = 0
    if path.exists():
        checkpoint = torch.load(path)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        torch.set_rng_state(checkpoint["random"])
        done = checkpoint["step"]
    while done < steps:
        batch = batch_at(done, len(data.train_labels))
        images, labels = data.train_images[batch], data.train_labels[batch]

        def closure(images=images, labels=labels):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        schedule.step()
        done += 1
        if done % save_every == 0 or done == steps:
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "random": torch.get_rng_state(),
                "step": done,
            }
            save_atomically(checkpoint, path)


def batch_at(step, size):
    """The indices of a step's batch, a function of the step: the order need not be saved."""
    epoch, position = divmod(step, -(-size // BATCH_SIZE))
    return torch.randperm(size, generator=torch.Generator().manual_seed(epoch)).split(BATCH_SIZE)[position]


def save_atomically(checkpoint, path):
    """After a kill, the file at `path` is the old or the new checkpoint, never a part of one."""
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
