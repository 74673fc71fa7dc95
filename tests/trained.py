"""Parameters of a low dtype in training, with masters or stochastic rounding, and how they are compared."""

import pytest
import torch
from checks import assert_same_bits, values
from registry import FUSED_VARIANTS

from fastsam import FastSAM

two_variants = pytest.mark.parametrize("variant", ["sgd-momentum", "adamw-amsgrad"])
SHAPES = [(33, 9), (), (257,), (0, 3), (2, 3, 4, 5)]
MASTER = "fastsam_master"


class Trained:
    """Parameters, and gradients that do not depend on them: pass ``i`` always gets the same."""

    def __init__(self, backend, device, dtype, variant, *, shapes=SHAPES, **options):
        self.params = [values(s, torch.bfloat16, device, i).to(dtype) for i, s in enumerate(shapes)]
        self.params = [p.requires_grad_() for p in self.params]
        cls, defaults = FUSED_VARIANTS[variant]
        self.optimizer = FastSAM(self.params, cls, backend=backend, **{"rho": 0.1, **defaults, **options})
        self.count = 0

    def give_grads(self, absent=()):
        self.count += 1
        for i, p in enumerate(self.params):
            grad = values(p.shape, torch.bfloat16, p.device, 100 * self.count + i)
            p.grad = None if i in absent else grad.to(p.dtype)

    def steps(self, count):
        for _ in range(count):
            self.perturb()
            self.descend()
        return self

    def perturb(self, absent=()):
        self.give_grads(absent)
        self.optimizer.first_step()

    def descend(self, absent=()):
        self.give_grads(absent)
        self.optimizer.second_step()

    def weights(self):
        return [p.detach().clone() for p in self.params]

    def masters(self):
        return [self.optimizer.state[p][MASTER].clone() for p in self.params]

    def moments(self):
        names = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
        state = [self.optimizer.state.get(p, {}) for p in self.params]
        return [{name: s[name].clone() for name in names if name in s} for s in state]


def assert_rounded(params, masters):
    assert all(m.dtype == torch.float32 for m in masters)
    assert_same_bits([p.detach() for p in params], [m.to(p.dtype) for p, m in zip(params, masters, strict=True)])
