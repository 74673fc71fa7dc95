"""What clients cannot do with FastSAM: each error names the way that works, and that way works."""

import warnings

import lightning
import opacus
import pytest
import torch
from setting import RHO, HandWrittenSAM, make_data, make_loader, make_model, mse
from test_lightning import Module, fit, trainer_of
from torch_lr_finder import LRFinder

from fastsam import FastSAM

OPTIONS = {"lr": 0.1, "momentum": 0.9}


# ---- Lightning ----


def test_lightnings_own_clipping_names_the_callback():
    with pytest.raises(RuntimeError, match=r"does not allow for gradient clipping.*FastSAMCallback\(\)"):
        fit(callbacks=[], precision="bf16-mixed", gradient_clip_val=0.1)
    fit(precision="bf16-mixed", gradient_clip_val=0.1)


def test_lightnings_accumulation_warns_of_what_it_loses():
    with pytest.warns(UserWarning, match="last micro-batch alone.*fastsam.integrations"):
        trainer_of(callbacks=[], accumulate_grad_batches=2).fit(Module(), make_loader())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", module="lightning")
        fit(accumulate_grad_batches=2)


def test_fabric_without_a_first_phase_names_the_two():
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = make_model()
    wrapped, optimizer = fabric.setup(model, FastSAM(model.parameters(), rho=RHO, **OPTIONS))
    x, y = make_data()
    fabric.backward(mse(wrapped(x), y))
    with pytest.raises(RuntimeError, match=r"first_step\(\) after the first backward and second_step\(\)"):
        optimizer.step()
    optimizer.first_step()
    fabric.backward(mse(wrapped(x), y))
    optimizer.step()


# ---- opacus ----


def make_private():
    model = make_model()
    sam = FastSAM(model.parameters(), rho=RHO, **OPTIONS)
    options = {"noise_multiplier": 0.0, "max_grad_norm": 1e6, "poisson_sampling": False}
    wrapped, dp, loader = opacus.PrivacyEngine().make_private(
        module=model, optimizer=sam, data_loader=make_loader(), **options
    )
    return model, sam, wrapped, dp, loader


def test_opacus_with_a_closure_names_the_two_phases():
    _, _, wrapped, dp, loader = make_private()
    x, y = next(iter(loader))

    def closure():
        dp.zero_grad()
        loss = mse(wrapped(x), y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"opacus.*first_step\(\) after the first backward and second_step\(\)"):
        dp.step(closure)


def test_opacus_in_two_phases(table):
    model, sam, wrapped, dp, loader = make_private()
    expected = make_model()
    by_hand = HandWrittenSAM(expected.parameters())
    for x, y in loader:
        mse(wrapped(x), y).backward()
        dp.pre_step()
        sam.first_step(zero_grad=False)
        dp.zero_grad()
        mse(wrapped(x), y).backward()
        dp.step()
        dp.zero_grad()
        by_hand.step(lambda x=x, y=y: mse(expected(x), y).backward())
    table.compare("opacus", "two phases", model, expected)


# ---- learning-rate finders ----


def test_a_learning_rate_finder_names_the_base():
    model = make_model()
    optimizer = FastSAM(model.parameters(), rho=RHO, lr=1e-5)
    with pytest.raises(RuntimeError, match=r"learning-rate finder, takes optimizer\.base_optimizer"):
        LRFinder(model, optimizer, torch.nn.MSELoss(), device="cpu").range_test(make_loader(), end_lr=1, num_iter=3)
    optimizer = FastSAM(model.parameters(), rho=RHO, lr=1e-5)  # the finder has left its schedule in the other one
    finder = LRFinder(model, optimizer.base_optimizer, torch.nn.MSELoss(), device="cpu")
    finder.range_test(make_loader(), end_lr=1, num_iter=3)
    assert len(finder.history["lr"]) == 3
