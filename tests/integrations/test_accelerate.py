"""Accelerate: its own loop with SAMBackward, and step(closure)."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from setting import RHO, by_norm, in_steps, make_loader, make_model, mse, train_by_hand

from fastsam import FastSAM, methods
from fastsam.integrations.accelerate import SAMBackward
from fastsam.training import sam_step

BATCHES = list(make_loader())
CLIP = 0.05
SCALE = 1024.0


class Loop:
    """A stock loop of Accelerate's documentation in which SAMBackward computes the gradients."""

    def __init__(self, *, scale=None, clip=None, accumulate=1, method=None, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if scale is not None:
            options["mixed_precision"] = "fp16"
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
        if scale is not None:  # Accelerate does this on a GPU only
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            self.accelerator.native_amp = True
        self.clip, self.module = clip, make_model()
        optimizer = FastSAM(self.module.parameters(), rho=RHO, lr=0.1, momentum=0.9, method=method or methods.SAM())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        self.prepared = self.accelerator.prepare(self.module, optimizer, make_loader(), schedule)

    def run(self, start=0):
        accelerator, (model, optimizer, loader, schedule) = self.accelerator, self.prepared
        backward = SAMBackward(accelerator, model, optimizer, max_grad_norm=self.clip)
        for i, (x, y) in enumerate(loader):
            if i < start:
                continue
            with accelerator.accumulate(model):
                backward(lambda x, y: mse(model(x), y), x, y)
                if self.clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), self.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return self.module


def halved(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def by_hand(accumulate=1, **options):
    return train_by_hand(in_steps(BATCHES, accumulate), schedule=halved, **options)


FLOAT16 = {"scale": SCALE, "autocast": torch.autocast("cpu", torch.float16)}
MODES = {
    "float32": ({}, {}),
    "clipping": ({"clip": CLIP}, {"clip": by_norm(CLIP)}),
    "accumulation": ({"accumulate": 2}, {"accumulate": 2}),
    "accumulation, the last step of 1": ({"accumulate": 3}, {"accumulate": 3, "divide_by": 3}),
    "accumulation, clipping": ({"accumulate": 2, "clip": CLIP}, {"accumulate": 2, "clip": by_norm(CLIP)}),
    "bf16": ({"mixed_precision": "bf16"}, {"autocast": torch.autocast("cpu", torch.bfloat16)}),
    "fp16 with a scaler": ({"scale": SCALE}, {**FLOAT16}),
    "fp16 with a scaler, accumulation, clipping": (
        {"scale": SCALE, "accumulate": 2, "clip": CLIP},
        {**FLOAT16, "accumulate": 2, "clip": by_norm(CLIP)},
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_stock_loop(table, mode):
    given, expected = MODES[mode]
    table.compare("Accelerate", mode, Loop(**given).run(), by_hand(**expected))


@pytest.mark.parametrize("method", [methods.GSAM(), methods.MomentumSAM(), methods.SAM(inner_steps=2)], ids=str)
def test_methods(table, method):
    loop = Loop(method=method, accumulate=2, clip=CLIP, scale=SCALE)
    model = make_model()
    optimizer = FastSAM(model.parameters(), rho=RHO, lr=0.1, momentum=0.9, method=method)
    schedule = halved(optimizer)
    options = {"scaler": torch.amp.GradScaler("cpu", init_scale=SCALE), "autocast": FLOAT16["autocast"]}
    for micro_batches in in_steps(BATCHES, 2):
        sam_step(model, lambda m, b: mse(m(b[0]), b[1]), micro_batches, optimizer, max_grad_norm=CLIP, **options)
        schedule.step()
    mode = f"{type(method).__name__}, fp16 with a scaler, accumulation, clipping"
    table.compare("Accelerate", mode, loop.run(), model)


def test_resume(table, tmp_path):
    first = Loop()
    first.prepared = (*first.prepared[:2], [*first.prepared[2]][:2], first.prepared[3])
    first.run()
    first.accelerator.save_state(tmp_path)
    second = Loop()
    second.accelerator.load_state(tmp_path)
    table.compare("Accelerate", "save_state, load_state", second.run(start=2), by_hand())


def test_an_overflow_skips_the_step():
    loop = Loop(scale=SCALE)
    model, optimizer, _, _ = loop.prepared
    backward = SAMBackward(loop.accelerator, model, optimizer)
    before = [p.detach().clone() for p in loop.module.parameters()]
    x, y = BATCHES[0]
    backward(lambda x, y: mse(model(x), y) * float("inf"), x, y)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(loop.module.parameters(), before, strict=True))
    assert loop.accelerator.scaler.get_scale() == SCALE / 2


def test_step_with_a_closure(table):
    loop = Loop()
    model, optimizer, loader, schedule = loop.prepared
    for x, y in loader:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loop.accelerator.backward(mse(model(x), y))

        optimizer.step(closure)
        schedule.step()
    table.compare("Accelerate", "step(closure)", loop.module, by_hand())


def test_fp16(table):
    if not torch.cuda.is_available():
        table.not_run("Accelerate", "fp16 on a GPU", "needs a GPU; see 'fp16 with a scaler' on the CPU")
    expected = by_hand(autocast=torch.autocast("cuda", torch.float16))
    table.compare("Accelerate", "fp16 on a GPU", Loop(mixed_precision="fp16").run(), expected, 1e-3)
