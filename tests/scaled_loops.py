"""Training loops under a GradScaler, and the loop without one that they are compared with."""

import torch
from torch.nn.utils import clip_grad_norm_

SCALE = 1024.0  # a power of two: scaling then changes no bit, and only a fault shows


def scaler_for(device, **options):
    return torch.amp.GradScaler(device.type, **{"init_scale": SCALE, "growth_interval": 1000, **options})


def scaled_backward(problem, scaler):
    loss = problem.loss()
    scaler.scale(loss).backward()
    return loss


def scaled_step(problem, optimizer, scaler, *, clip=None):
    """The loop of torch's AMP examples, with a first phase in front."""
    optimizer.zero_grad()
    scaled_backward(problem, scaler)
    optimizer.first_step()
    scaled_backward(problem, scaler)
    if clip is not None:
        scaler.unscale_(optimizer)
        clip_grad_norm_(problem.model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


def plain_step(problem, optimizer, *, clip=None):
    problem.first_step(optimizer)
    problem.backward()
    if clip is not None:
        clip_grad_norm_(problem.model.parameters(), clip)
    optimizer.second_step()
