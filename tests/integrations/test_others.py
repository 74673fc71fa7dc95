"""fastai's callback, ignite's trainer, and skorch, which needs nothing."""

import contextlib
import io
import pickle
from functools import partial

import fastai.callback.schedule  # noqa: F401  # adds fit_one_cycle to Learner
import numpy as np
import pytest
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from ignite.engine import Events
from setting import RHO, by_norm, in_steps, make_data, make_loader, make_model, mse, train_by_hand
from skorch import NeuralNetRegressor
from torch import nn

from fastsam import FastSAM, methods
from fastsam.integrations.fastai import SAMCallback
from fastsam.integrations.ignite import create_sam_trainer
from fastsam.training import sam_step

BATCHES = list(make_loader())
CLIP = 0.05
SCALE = 1024.0
SGD = {"lr": 0.1, "momentum": 0.9}
FLOAT16 = {"scale": SCALE, "autocast": torch.autocast("cpu", torch.float16)}


def by_sam_step(method, accumulate=1, epochs=1, **options):
    model = make_model()
    optimizer = FastSAM(model.parameters(), rho=RHO, method=method, **SGD)
    for micro_batches in in_steps(BATCHES, accumulate, epochs):
        sam_step(model, lambda m, b: mse(m(b[0]), b[1]), micro_batches, optimizer, **options)
    return model


# ---- fastai ----


class Learning:
    """A fastai run of two epochs."""

    def __init__(self, *callbacks, method=None):
        loader = make_loader()
        options = {"rho": RHO, "momentum": 0.9, "method": method or methods.SAM()}
        opt_func = partial(OptimWrapper, opt=FastSAM, **options)
        callbacks = [SAMCallback(), *callbacks]
        self.learner = Learner(
            DataLoaders(loader, loader), make_model(), loss_func=mse, opt_func=opt_func, lr=0.1, cbs=callbacks, wd=0.0
        )

    def run(self, epochs=2):
        with contextlib.redirect_stdout(io.StringIO()), self.learner.no_logging():
            self.learner.fit(epochs)
        return self.learner.model


class HalfPrecisionOnTheCPU(MixedPrecision):
    """fastai's callback asks for "cuda"; everything else is its own."""

    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast("cpu", torch.float16)
        self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)


FASTAI = {
    "float32": ((), {}),
    "GradientClip": ((GradientClip(CLIP),), {"clip": by_norm(CLIP)}),
    "GradientAccumulation": ((GradientAccumulation(32),), {"accumulate": 2}),
    "GradientAccumulation, GradientClip": (
        (GradientAccumulation(32), GradientClip(CLIP)),
        {"accumulate": 2, "clip": by_norm(CLIP)},
    ),
    "fp16 with a scaler": ((HalfPrecisionOnTheCPU(),), {**FLOAT16}),
    "fp16 with a scaler, GradientAccumulation, GradientClip": (
        (HalfPrecisionOnTheCPU(), GradientAccumulation(32), GradientClip(CLIP)),
        {**FLOAT16, "accumulate": 2, "clip": by_norm(CLIP)},
    ),
}


@pytest.mark.parametrize("mode", FASTAI)
def test_fastai(table, mode):
    callbacks, expected = FASTAI[mode]
    by_hand = train_by_hand(in_steps(BATCHES, expected.pop("accumulate", 1), 2), **expected)
    table.compare("fastai", mode, Learning(*callbacks).run(), by_hand)


@pytest.mark.parametrize("method", [methods.GSAM(), methods.MomentumSAM(), methods.SAM(inner_steps=2)], ids=str)
def test_methods_in_fastai(table, method):
    callbacks = (HalfPrecisionOnTheCPU(), GradientAccumulation(32), GradientClip(CLIP))
    options = {"scaler": torch.amp.GradScaler("cpu", init_scale=SCALE), "autocast": FLOAT16["autocast"]}
    expected = by_sam_step(method, 2, epochs=2, max_grad_norm=CLIP, **options)
    mode = f"{type(method).__name__}, fp16 with a scaler, GradientAccumulation, GradientClip"
    table.compare("fastai", mode, Learning(*callbacks, method=method).run(), expected)


def test_an_overflow_in_fastai_skips_the_step():
    learning = Learning(HalfPrecisionOnTheCPU())
    learning.learner.loss_func = lambda output, target: mse(output, target) * float("inf")
    before = [p.detach().clone() for p in learning.learner.model.parameters()]
    model = learning.run(1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not learning.learner.opt.opt.perturbed


def test_fastai_schedules_and_saves(tmp_path):
    learning = Learning()
    with contextlib.redirect_stdout(io.StringIO()), learning.learner.no_logging():
        learning.learner.fit_one_cycle(1, 0.1)
    learning.learner.path = tmp_path
    learning.learner.save("model", with_opt=True)
    learning.learner.load("model", with_opt=True)


def test_fastai_on_a_gpu(table):
    table.not_run("fastai", "to_fp16() on a GPU", "needs a GPU; see 'fp16 with a scaler' on the CPU")


# ---- ignite ----

IGNITE = {
    "float32": ({}, {}),
    "max_grad_norm": ({"max_grad_norm": CLIP}, {"clip": by_norm(CLIP)}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
    "bf16": (
        {"autocast": torch.autocast("cpu", torch.bfloat16)},
        {"autocast": torch.autocast("cpu", torch.bfloat16)},
    ),
    "fp16 with a scaler, accumulation, max_grad_norm": (
        {"scaler": True, "autocast": FLOAT16["autocast"], "gradient_accumulation_steps": 2, "max_grad_norm": CLIP},
        {**FLOAT16, "accumulate": 2, "clip": by_norm(CLIP)},
    ),
}


@pytest.mark.parametrize("mode", IGNITE)
def test_ignite(table, mode):
    given, expected = (dict(options) for options in IGNITE[mode])
    model, halve = make_model(), lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)
    optimizer = FastSAM(model.parameters(), rho=RHO, **SGD)
    if given.get("scaler"):
        given["scaler"] = torch.amp.GradScaler("cpu", init_scale=SCALE)
    trainer, schedule = create_sam_trainer(model, optimizer, mse, **given), halve(optimizer)
    accumulate = expected.pop("accumulate", 1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=accumulate), lambda _: schedule.step())
    losses = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
    trainer.run(make_loader(), max_epochs=2)
    assert len(losses) == 2 * len(BATCHES)
    table.compare("ignite", mode, model, train_by_hand(in_steps(BATCHES, accumulate, 2), schedule=halve, **expected))


def test_ignite_refuses_another_optimizer():
    model = make_model()
    with pytest.raises(TypeError, match="must be FastSAM, got SGD"):
        create_sam_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), mse)


# ---- skorch ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_model()

    def forward(self, x):
        return self.net(x)


def test_skorch(table):
    options = {"optimizer": FastSAM, "optimizer__rho": RHO, "optimizer__momentum": 0.9, "lr": 0.1}
    net = NeuralNetRegressor(Net, **options, batch_size=16, max_epochs=2, train_split=None, verbose=0)
    net.fit(*(np.asarray(t) for t in make_data()))
    pickle.loads(pickle.dumps(net))
    table.compare("skorch", "float32", net.module_.net, train_by_hand(in_steps(BATCHES, 1, 2)))
