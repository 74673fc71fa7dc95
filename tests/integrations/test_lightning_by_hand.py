"""Lightning: loops that call the optimizer themselves: manual optimization, Fabric."""

import lightning
import pytest
import torch
from setting import RHO, by_norm, in_steps, make_model, mse
from test_lightning import BATCHES, CLIP, EPOCHS, Module, by_hand, fit

from fastsam import FastSAM
from fastsam.integrations.lightning import FastSAMCallback


class Manual(Module):
    def __init__(self, step):
        super().__init__()
        self.automatic_optimization, self.step = False, step

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.step(self, optimizer, lambda: self.manual_backward(mse(self.net(batch[0]), batch[1])))


def by_closure(module, optimizer, backward):
    def closure():
        optimizer.zero_grad()
        backward()

    optimizer.step(closure=closure)


def by_two_phases(module, optimizer, backward):
    backward()
    optimizer.first_step()
    backward()
    optimizer.step()


@pytest.mark.parametrize("step", [by_closure, by_two_phases], ids=["closure", "two phases"])
@pytest.mark.parametrize("callbacks", [[], [FastSAMCallback()]], ids=["alone", "with the callback"])
def test_manual_optimization(table, step, callbacks):
    module, trainer = fit(Manual(step), callbacks=callbacks)
    assert trainer.global_step == EPOCHS * len(BATCHES)
    mode = "manual optimization, " + ("closure" if step is by_closure else "two phases")
    table.compare("Lightning", mode, module.net, by_hand())


@pytest.mark.parametrize("step", [by_closure, by_two_phases], ids=["closure", "two phases"])
def test_fabric(table, step):
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = make_model()
    wrapped, optimizer = fabric.setup(model, FastSAM(model.parameters(), rho=RHO, lr=0.1, momentum=0.9))
    for x, y in EPOCHS * BATCHES:
        optimizer.zero_grad()
        step(None, optimizer, lambda x=x, y=y: fabric.backward(mse(wrapped(x), y)))
    table.compare("Lightning Fabric", "closure" if step is by_closure else "two phases", model, by_hand())


def test_fabric_with_accumulation_clipping_and_bf16(table):
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = make_model()
    wrapped, optimizer = fabric.setup(model, FastSAM(model.parameters(), rho=RHO, lr=0.1, momentum=0.9))
    for micro_batches in in_steps(BATCHES, 2, EPOCHS):

        def closure(micro_batches=micro_batches):
            optimizer.zero_grad()
            for i, (x, y) in enumerate(micro_batches):
                with fabric.no_backward_sync(wrapped, enabled=i < len(micro_batches) - 1):
                    fabric.backward(mse(wrapped(x), y) / len(micro_batches))
            fabric.clip_gradients(wrapped, optimizer, max_norm=CLIP)

        optimizer.step(closure=closure)
    expected = by_hand(accumulate=2, clip=by_norm(CLIP), autocast=torch.autocast("cpu", torch.bfloat16))
    table.compare("Lightning Fabric", "bf16-mixed, accumulation, clipping", model, expected)
