"""SAM over Muon: one FastSAM over all parameters, whose base runs Muon for the matrices and AdamW for the rest.

    python examples/muon.py

`torch.optim.Muon` takes matrices alone. Two FastSAM optimizers, one over Muon and one over AdamW, would have two norms,
and each would perturb and take its second gradient without the other's perturbation. With a base that is made of both
there is one norm and one second pass. Needs scikit-learn.
"""

import torch
from torch import nn
from torch.nn import functional as F

from fastsam import FastSAM
from fastsam.demo.data import load_noisy_digits


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the parameter groups with `muon=True`, AdamW for the others; a group may set any of their options."""

    def __init__(self, params, lr=1e-3, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "muon": False})
        self._parts = {}
        for is_muon, optimizer in ((True, torch.optim.Muon), (False, torch.optim.AdamW)):
            if groups := self._groups(is_muon):
                # The part completes these groups, which stay this optimizer's, with its own defaults.
                self._parts[is_muon] = optimizer(groups)
        self._share()

    def _groups(self, is_muon):
        return [group for group in self.param_groups if group["muon"] == is_muon]

    def _share(self):
        """The parts work on this optimizer's groups and state, also after a load_state_dict()."""
        for is_muon, part in self._parts.items():
            part.param_groups, part.state = self._groups(is_muon), self.state

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._share()
        for part in self._parts.values():
            part.step()
        return loss


def groups_of(model, muon_lr=0.02, adamw_lr=3e-3):
    """The hidden matrices for Muon; the first and last layer, biases and norms for AdamW, as Muon's author advises."""
    layers = [module for module in model if isinstance(module, nn.Linear)]
    hidden = [layer.weight for layer in layers[1:-1]]
    others = [p for p in model.parameters() if all(p is not weight for weight in hidden)]
    return [{"params": hidden, "muon": True, "lr": muon_lr}, {"params": others, "lr": adamw_lr}]


def train(epochs=20, rho=0.1, seed=0):
    """The test accuracy, in percent, of a network trained on digits with 40% wrong labels."""
    data = load_noisy_digits(noise=0.4, seed=seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = FastSAM(groups_of(model), MuonAndAdamW, rho=rho)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_images)).split(32):

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
                loss.backward()
                return loss

            optimizer.step(closure)
    return 100 * (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()


if __name__ == "__main__":
    for rho in (0.0, 0.1, 0.5):
        print(f"rho {rho}: test accuracy {train(rho=rho):.1f}%")
