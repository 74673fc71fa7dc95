"""Lightning: automatic optimization with FastSAMCallback."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from setting import RHO, HandWrittenSAM, by_norm, by_value, in_steps, make_loader, make_model, mse, train_by_hand

from fastsam import FastSAM, methods
from fastsam.integrations.lightning import FastSAMCallback, SharpnessMonitor
from fastsam.training import sam_step

EPOCHS = 2
CLIP = 0.05
SCALE = 1024.0


class Module(lightning.LightningModule):
    def __init__(self, schedule=None, logs=False, **options):
        super().__init__()
        self.net, self.schedule, self.logs = make_model(), schedule, logs
        self.options = {"rho": RHO, "lr": 0.1, "momentum": 0.9, **options}
        self.calls, self.steps = 0, 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        x, y = batch
        loss = mse(self.net(x), y)
        if self.logs:
            self.log("loss", loss, on_step=False, on_epoch=True)
            self.log_dict({"twice the loss": 2 * loss}, on_step=False, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.steps += 1

    def configure_optimizers(self):
        optimizer = FastSAM(self.parameters(), **self.options)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def trainer_of(*, epochs=EPOCHS, callbacks=None, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[FastSAMCallback()] if callbacks is None else callbacks,
        **{"devices": 1, **options},
    )


def fit(module=None, *, checkpoint=None, loader=None, **options):
    module = module or Module()
    trainer = trainer_of(**options)
    trainer.fit(module, loader or make_loader(), ckpt_path=checkpoint)
    return module, trainer


def scaler_plugin(scale=SCALE):
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]


def autocast(dtype):
    return torch.autocast("cpu", dtype, cache_enabled=False)


BATCHES = list(make_loader())
SCHEDULES = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
}
MODES = {
    "float32": ({}, {}),
    "gradient_clip_val": ({"gradient_clip_val": CLIP}, {"clip": by_norm(CLIP)}),
    "gradient_clip_val, by value": (
        {"gradient_clip_val": CLIP, "gradient_clip_algorithm": "value"},
        {"clip": by_value(CLIP)},
    ),
    "accumulate_grad_batches=2": ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "accumulate_grad_batches=3, the last step of 1": (
        {"accumulate_grad_batches": 3},
        {"accumulate": 3, "divide_by": 3},
    ),
    "accumulation and clipping": (
        {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP},
        {"accumulate": 2, "clip": by_norm(CLIP)},
    ),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"autocast": autocast(torch.bfloat16)}),
    "bf16-mixed, accumulation, clipping": (
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": CLIP},
        {"autocast": autocast(torch.bfloat16), "accumulate": 2, "clip": by_norm(CLIP)},
    ),
    "16-mixed with a scaler": ({"scaler": True}, {"autocast": autocast(torch.float16), "scale": SCALE}),
    "16-mixed with a scaler, clipping": (
        {"scaler": True, "gradient_clip_val": CLIP},
        {"autocast": autocast(torch.float16), "scale": SCALE, "clip": by_norm(CLIP)},
    ),
    "16-mixed with a scaler, accumulation, clipping": (
        {"scaler": True, "accumulate_grad_batches": 2, "gradient_clip_val": CLIP},
        {"autocast": autocast(torch.float16), "scale": SCALE, "accumulate": 2, "clip": by_norm(CLIP)},
    ),
}


def by_hand(accumulate=1, **options):
    return train_by_hand(in_steps(BATCHES, accumulate, EPOCHS), **options)


@pytest.mark.parametrize("mode", MODES)
def test_automatic_optimization(table, mode):
    given, expected = MODES[mode]
    options = dict(given)
    if options.pop("scaler", False):
        options["plugins"] = scaler_plugin()
    module, trainer = fit(**options)
    steps = EPOCHS * -(-len(BATCHES) // given.get("accumulate_grad_batches", 1))
    assert trainer.global_step == module.steps == steps
    assert module.calls == 2 * EPOCHS * len(BATCHES)
    table.compare("Lightning", mode, module.net, by_hand(**expected))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(table, name):
    module, _ = fit(Module(SCHEDULES[name]))
    table.compare("Lightning", name, module.net, by_hand(schedule=SCHEDULES[name]))


def test_a_plateau_of_the_logged_loss(table):
    plateau = {"factor": 0.5, "patience": 0, "threshold": 0.3}

    class Plateau(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **plateau)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "loss"}}

    module, trainer = fit(Plateau(logs=True), epochs=4)
    model = make_model()
    sam = HandWrittenSAM(model.parameters())
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(sam.base, **plateau)
    for _ in range(4):
        losses = []
        for x, y in BATCHES:
            losses.append(mse(model(x), y).item())
            sam.step(lambda x=x, y=y: mse(model(x), y).backward())
        schedule.step(sum(losses) / len(losses))
    assert trainer.optimizers[0].param_groups[0]["lr"] == sam.base.param_groups[0]["lr"] < 0.1
    table.compare("Lightning", "ReduceLROnPlateau", module.net, model)


def test_an_accumulation_that_changes_between_epochs(table):
    callbacks = [FastSAMCallback(), GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})]
    module, trainer = fit(epochs=3, callbacks=callbacks, gradient_clip_val=CLIP)
    steps = [micro_batches for accumulate in (1, 2, 4) for micro_batches in in_steps(BATCHES, accumulate)]
    assert trainer.global_step == module.steps == len(steps)
    expected = train_by_hand(steps, clip=by_norm(CLIP))
    table.compare("Lightning", "GradientAccumulationScheduler, clipping", module.net, expected)


def by_sam_step(method, *, accumulate=1, clip=None, scaler=None, autocast=None, **options):
    """Another method's training; its steps are compared with the oracle in tests/unit/test_training.py."""
    model = make_model()
    optimizer = FastSAM(model.parameters(), rho=RHO, lr=0.1, momentum=0.9, method=method, **options)
    loss_fn = lambda model, batch: mse(model(batch[0]), batch[1])  # noqa: E731
    for micro_batches in in_steps(BATCHES, accumulate, EPOCHS):
        options = {"scaler": scaler, "max_grad_norm": clip, "autocast": autocast}
        sam_step(model, loss_fn, micro_batches, optimizer, **options)
    return model


@pytest.mark.parametrize(
    "method",
    [methods.SAM(inner_steps=2), methods.GSAM(), methods.LookSAM(k=2), methods.MomentumSAM(), methods.RandomSAM()],
    ids=str,
)
@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaler"])
def test_methods_with_accumulation_and_clipping(table, method, scaled):
    options = {"plugins": scaler_plugin()} if scaled else {}
    module, _ = fit(Module(method=method), accumulate_grad_batches=2, gradient_clip_val=CLIP, **options)
    if scaled:
        options = {"scaler": torch.amp.GradScaler("cpu", init_scale=SCALE), "autocast": autocast(torch.float16)}
    expected = by_sam_step(method, accumulate=2, clip=CLIP, **options)
    mode = f"{type(method).__name__}, accumulation, clipping" + scaled * ", scaler"
    table.compare("Lightning", mode, module.net, expected)


def test_an_interval(table):
    module, _ = fit(Module(interval=2), accumulate_grad_batches=2)
    assert module.calls == EPOCHS * len(BATCHES) * 3 / 2
    expected = by_sam_step(methods.SAM(), accumulate=2, interval=2)
    table.compare("Lightning", "interval=2, accumulation", module.net, expected)


def test_a_methods_gradients_are_scaled_alike_without_clipping(table):
    module, _ = fit(Module(method=methods.GSAM()), plugins=scaler_plugin())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    expected = by_sam_step(methods.GSAM(), scaler=scaler, autocast=autocast(torch.float16))
    table.compare("Lightning", "GSAM, scaler", module.net, expected)


def test_an_own_configure_gradient_clipping(table):
    class Clips(Module):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")

    module, _ = fit(Clips(), plugins=scaler_plugin())
    expected = by_hand(autocast=autocast(torch.float16), scale=SCALE, clip=by_norm(CLIP))
    table.compare("Lightning", "configure_gradient_clipping, scaler", module.net, expected)


def test_an_own_optimizer_step_takes_part(table):
    class WarmsUp(Module):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * min(1, (self.trainer.global_step + 1) / 4)
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    module, _ = fit(WarmsUp())
    warm_up = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / 4))  # noqa: E731
    table.compare("Lightning", "own optimizer_step", module.net, by_hand(schedule=warm_up))


def test_a_run_goes_on_from_a_checkpoint(table, tmp_path):
    _, trainer = fit(Module(SCHEDULES["StepLR"]), epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module, _ = fit(Module(SCHEDULES["StepLR"]), checkpoint=tmp_path / "half.ckpt")
    table.compare("Lightning", "resume", module.net, by_hand(schedule=SCHEDULES["StepLR"]), tolerance=1e-6)


@pytest.mark.parametrize("clip", [None, CLIP], ids=["unclipped", "clipped"])
def test_an_overflow_skips_the_step(clip):
    class Overflows(Module):
        def training_step(self, batch, batch_idx):
            factor = float("inf") if batch_idx == 1 else 1.0
            return super().training_step(batch, batch_idx) * factor

    module, trainer = fit(Overflows(), plugins=scaler_plugin(), epochs=1, gradient_clip_val=clip)
    assert trainer.precision_plugin.scaler.get_scale() == SCALE / 2
    assert not trainer.optimizers[0].perturbed
    assert all(p.isfinite().all() for p in module.parameters())


def test_the_log_has_the_first_passs_losses():
    _, trainer = fit(Module(logs=True), epochs=1, accumulate_grad_batches=2)
    model = make_model()
    optimizer = FastSAM(model.parameters(), rho=RHO, lr=0.1, momentum=0.9)
    loss_fn = lambda model, batch: mse(model(batch[0]), batch[1])  # noqa: E731
    losses = [sam_step(model, loss_fn, micro_batches, optimizer) for micro_batches in in_steps(BATCHES, 2)]
    mean = sum(losses) / len(losses)
    torch.testing.assert_close(trainer.callback_metrics["loss"], mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(trainer.callback_metrics["twice the loss"], 2 * mean, rtol=1e-5, atol=0)


class Records(lightning.pytorch.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.records = {}

    def log_metrics(self, metrics, step=None):
        self.records.setdefault(step, {}).update(metrics)


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaler"])
def test_the_sharpness_is_logged(scaled):
    logger, monitor = Records(), SharpnessMonitor(every=1)
    options = {"plugins": scaler_plugin(), "accumulate_grad_batches": 2} if scaled else {"accumulate_grad_batches": 2}
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[FastSAMCallback(), monitor],
        **options,
    )
    trainer.fit(Module(), make_loader())
    model = make_model()
    optimizer = FastSAM(model.parameters(), rho=RHO, lr=0.1, momentum=0.9)
    for record, micro_batches in zip(monitor.monitor.history, in_steps(BATCHES, 2), strict=True):

        def closure(micro_batches=micro_batches):
            optimizer.zero_grad()
            total = sum(mse(model(x), y) for x, y in micro_batches) / len(micro_batches)
            total.backward()
            return total

        optimizer.step(closure)
        ours = [record[name] for name in ("loss", "perturbed_loss", "grad_norm", "ascent")]
        last = optimizer.last_ascent
        theirs = [float(x) for x in (last.loss, last.perturbed_loss, last.grad_norm, last.sharpness)]
        assert ours == pytest.approx(theirs, abs=1e-2 if scaled else 1e-6)
    logged = [metrics["sharpness/ascent"] for metrics in logger.records.values() if "sharpness/ascent" in metrics]
    assert logged == [record["ascent"] for record in monitor.monitor.history]


def test_skipped_batches():
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (1, 2) else super().training_step(batch, batch_idx)

    module, _ = fit(Skips(), epochs=1, accumulate_grad_batches=2)
    assert module.calls == 4
    _, trainer = fit(Skips(), epochs=1)
    assert not trainer.optimizers[0].perturbed


def test_validation_within_a_step_sees_the_weights_unperturbed(table):
    class Validates(Module):
        def validation_step(self, batch, batch_idx):
            assert not self.optimizers().perturbed

    module = Validates(method=methods.RandomSAM())
    trainer = trainer_of(accumulate_grad_batches=2, val_check_interval=1, num_sanity_val_steps=0)
    trainer.fit(module, make_loader(), make_loader(16))
    expected = by_sam_step(methods.RandomSAM(), accumulate=2)
    table.compare("Lightning", "RandomSAM, validation within a step", module.net, expected)


def test_an_exception_restores_the_weights():
    class Fails(Module):
        def training_step(self, batch, batch_idx):
            if self.calls == 3:
                self.before = [p.detach().clone() for p in self.parameters()]
                self.was_perturbed = self.optimizers().perturbed
                raise KeyError("mine")
            return super().training_step(batch, batch_idx)

    module = Fails()
    trainer = trainer_of()
    with pytest.raises(KeyError, match="mine"):
        trainer.fit(module, make_loader())
    assert module.was_perturbed
    assert not trainer.optimizers[0].perturbed
    assert "optimizer_step" not in vars(module) or module.optimizer_step.__func__ is Fails.optimizer_step


def test_another_optimizer_is_refused():
    class Other(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match="must be FastSAM, got SGD"):
        fit(Other())
