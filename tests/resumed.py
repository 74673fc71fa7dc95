"""Training that goes on from a checkpoint, by FastSAM and by its base alone."""

import torch
from checks import assert_same_bits, assert_within, has_torchs_bits, values
from problem import (
    state_of,
)
from registry import FUSED_VARIANTS

from fastsam import FastSAM


def fused(problem, backend, variant, **options):
    cls, base_options = FUSED_VARIANTS[variant]
    return FastSAM(problem.model.parameters(), cls, backend=backend, **{"rho": 0.0, **base_options, **options})


def alone(problem, variant):
    cls, base_options = FUSED_VARIANTS[variant]
    return cls(problem.model.parameters(), foreach=False, **base_options)


def give_grads(problem, seed):
    for i, p in enumerate(problem.params):
        p.grad = values(p.shape, p.dtype, p.device, seed=100 * seed + i)


def train(problem, optimizer, seeds):
    """Steps with gradients that do not depend on the weights."""
    for seed in seeds:
        give_grads(problem, seed)
        if isinstance(optimizer, FastSAM):
            optimizer.first_step()
            give_grads(problem, seed)
        optimizer.step()


def assert_go_on_alike(backend, mine, optimizer, theirs, other):
    """From the same weights and state on: torch.optim's bits where they are promised, the tolerance elsewhere."""
    exact = has_torchs_bits(backend, mine.params[0].device)
    with torch.no_grad():
        for p, q in zip(mine.params, theirs.params, strict=True):
            q.copy_(p)
    for seed in (11, 12) if exact else (11,):
        start = mine.weights()
        train(mine, optimizer, [seed])
        train(theirs, other, [seed])
        if exact:
            assert_same_bits(mine.weights(), theirs.weights())
        else:
            assert_within(mine.weights(), theirs.weights(), start)
    ours, reference = state_of(optimizer), state_of(other)
    assert sorted(ours) == sorted(reference)
    for i, entries in reference.items():
        assert {name for name in ours[i] if not name.startswith("fastsam_")} == {
            name for name in entries if not name.startswith("fastsam_")
        }
