"""fastai's callback, ignite's trainer, and skorch, which needs nothing."""

import contextlib
import io
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from ignite.engine import Events
from ignite.handlers import Checkpoint
from setting import RHO, by_norm, in_steps, make_data, make_loader, make_model, mse, train_by_hand
from skorch import NeuralNetRegressor
from skorch.callbacks import GradientNormClipping, LRScheduler
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
BFLOAT16 = torch.autocast("cpu", torch.bfloat16)


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

    def run(self, epochs=2, **options):
        with contextlib.redirect_stdout(io.StringIO()), self.learner.no_logging():
            self.learner.fit(epochs, **options)
        return self.learner.model


class HalfPrecisionOnTheCPU(MixedPrecision):
    """fastai's callback asks for "cuda"; everything else is its own."""

    def before_fit(self):
        super().before_fit()
        is_float16 = self.amp_mode is AMPMode.FP16
        self.autocast = torch.autocast("cpu", torch.float16 if is_float16 else torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=is_float16)


FASTAI = {
    "float32": ((), {}),
    "GradientClip": ((GradientClip(CLIP),), {"clip": by_norm(CLIP)}),
    "GradientAccumulation": ((GradientAccumulation(32),), {"accumulate": 2}),
    "GradientAccumulation, GradientClip": (
        (GradientAccumulation(32), GradientClip(CLIP)),
        {"accumulate": 2, "clip": by_norm(CLIP)},
    ),
    "bf16": ((HalfPrecisionOnTheCPU(AMPMode.BF16),), {"autocast": BFLOAT16}),
    "bf16, GradientAccumulation, GradientClip": (
        (HalfPrecisionOnTheCPU(AMPMode.BF16), GradientAccumulation(32), GradientClip(CLIP)),
        {"autocast": BFLOAT16, "accumulate": 2, "clip": by_norm(CLIP)},
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


def test_a_schedule_in_fastai(table):
    model = Learning(ParamScheduler({"lr": SchedCos(0.1, 0.01)})).run()
    rate = SchedCos(0.1, 0.01)
    schedule = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step / (2 * len(BATCHES))) / 0.1)  # noqa: E731
    table.compare("fastai", "ParamScheduler", model, train_by_hand(in_steps(BATCHES, 1, 2), schedule=schedule))


def test_fit_one_cycle_runs():
    learning = Learning()
    with contextlib.redirect_stdout(io.StringIO()), learning.learner.no_logging():
        learning.learner.fit_one_cycle(1, 0.1)
    assert all(p.isfinite().all() for p in learning.learner.model.parameters())


def test_a_fastai_run_goes_on_from_a_file(table, tmp_path):
    first, second = Learning(), Learning()
    first.learner.path = second.learner.path = tmp_path
    first.run(1)
    first.learner.save("half", with_opt=True)
    second.learner.load("half", with_opt=True)
    table.compare("fastai", "resume", second.run(2, start_epoch=1), train_by_hand(in_steps(BATCHES, 1, 2)))


def test_fastai_on_a_gpu(table):
    table.not_run("fastai", "to_fp16() on a GPU", "needs a GPU; see 'fp16 with a scaler' on the CPU")


# ---- ignite ----

IGNITE = {
    "float32": ({}, {}),
    "max_grad_norm": ({"max_grad_norm": CLIP}, {"clip": by_norm(CLIP)}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
    "bf16": (
        {"autocast": BFLOAT16},
        {"autocast": BFLOAT16},
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


def test_an_ignite_run_goes_on_from_a_checkpoint(table, tmp_path):
    def run(epochs, checkpoint=None):
        model = make_model()
        optimizer = FastSAM(model.parameters(), rho=RHO, **SGD)
        trainer = create_sam_trainer(model, optimizer, mse)
        parts = {"model": model, "optimizer": optimizer, "trainer": trainer}
        trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(parts, str(tmp_path / str(epochs))))
        if checkpoint:
            Checkpoint.load_objects(parts, torch.load(checkpoint))
        trainer.run(make_loader(), max_epochs=epochs)
        return model

    run(1)
    (checkpoint,) = (tmp_path / "1").iterdir()
    table.compare("ignite", "resume", run(2, checkpoint), train_by_hand(in_steps(BATCHES, 1, 2)))


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


def fit_net(net=None, *callbacks, epochs=2):
    options = {"optimizer": FastSAM, "optimizer__rho": RHO, "optimizer__momentum": 0.9, "lr": 0.1}
    options |= {"batch_size": 16, "train_split": None, "verbose": 0, "callbacks": list(callbacks)}
    net = net or NeuralNetRegressor(Net, **options).initialize()
    return net.partial_fit(*(np.asarray(t) for t in make_data()), epochs=epochs)


SKORCH = {
    "float32": ((), {}),
    "GradientNormClipping": ((GradientNormClipping(CLIP),), {"clip": by_norm(CLIP)}),
    "LRScheduler": (
        (LRScheduler(torch.optim.lr_scheduler.StepLR, step_size=3, step_every="batch"),),
        {"schedule": lambda base: torch.optim.lr_scheduler.StepLR(base, 3)},
    ),
}


@pytest.mark.parametrize("mode", SKORCH)
def test_skorch(table, mode):
    callbacks, expected = SKORCH[mode]
    net = fit_net(None, *callbacks)
    table.compare("skorch", mode, net.module_.net, train_by_hand(in_steps(BATCHES, 1, 2), **expected))


def test_a_skorch_run_goes_on_from_a_pickle(table):
    net = fit_net(pickle.loads(pickle.dumps(fit_net(epochs=1))), epochs=1)
    table.compare("skorch", "resume", net.module_.net, train_by_hand(in_steps(BATCHES, 1, 2)))
