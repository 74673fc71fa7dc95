"""timm: its registry, and its training loop with SAMBackward."""

from contextlib import nullcontext

import pytest
import timm
import torch
from setting import HandWrittenSAM
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.optim.lookahead import Lookahead
from timm.scheduler import CosineLRScheduler
from timm.utils import NativeScaler, dispatch_clip_grad
from torch.nn import functional as F

from fastsam import FastSAM, methods
from fastsam.integrations.timm import SAMBackward, register
from fastsam.training import sam_step

register()
register()

STEPS = 3
generator = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(4, 3, 32, 32, generator=generator), torch.randint(0, 5, (4,), generator=generator))
    for _ in range(2 * STEPS)
]


def vit():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 16, "depth": 2, "num_classes": 5, "embed_dim": 24, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def native_scaler():
    scaler = NativeScaler(device="cpu")
    scaler._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return scaler


def train(optimizer, model, *, batches=BATCHES, scaler=None, accumulate=1, autocast=None, schedule=None, **clip):
    def loss_fn(x, y):
        with autocast or nullcontext():
            return F.cross_entropy(model(x), y) / accumulate

    backward = SAMBackward(optimizer, scaler)
    for i, (x, y) in enumerate(batches):
        need_update = (i + 1) % accumulate == 0
        backward(loss_fn, x, y, need_update=need_update, parameters=model.parameters(), **clip)
        if need_update:
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step_update(i // accumulate)
    return model


def train_by_hand(model, groups=None, *, accumulate=1, autocast=None, schedule=None, clip=None, **options):
    base = options.pop("base", torch.optim.SGD)
    groups = groups or [{"params": list(model.parameters())}]
    params = [p for group in groups for p in group["params"]]
    sam = HandWrittenSAM(params, lambda _, **kwargs: base(groups, **kwargs), rho=0.05, **options)
    schedule = schedule and schedule(sam.base)
    for i in range(0, len(BATCHES), accumulate):

        def add_gradients(i=i):
            for x, y in BATCHES[i : i + accumulate]:
                with autocast or nullcontext():
                    loss = F.cross_entropy(model(x), y) / accumulate
                loss.backward()

        sam.step(add_gradients, clip=clip)
        if schedule:
            schedule.step_update(i // accumulate)
    return model


def created(model, **options):
    return create_optimizer_v2(model, "fastsam", **{"lr": 0.1, "rho": 0.05, **options})


SGD = {"lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("scaler", [None, native_scaler], ids=["plain", "NativeScaler"])
@pytest.mark.parametrize("clip_mode", [None, "norm", "value", "agc"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_training_loop(table, scaler, clip_mode, accumulate):
    model, clips = vit(), {"clip_grad": 0.01, "clip_mode": clip_mode} if clip_mode else {}
    train(created(model), model, scaler=scaler and scaler(), accumulate=accumulate, **clips)
    clip = clip_mode and (lambda params: dispatch_clip_grad(params, 0.01, mode=clip_mode))
    mode = ["NativeScaler" if scaler else "float32", *([f"clipping by {clip_mode}"] if clip_mode else [])]
    mode += ["accumulation"] if accumulate > 1 else []
    table.compare("timm", ", ".join(mode), model, train_by_hand(vit(), accumulate=accumulate, clip=clip, **SGD))


def test_bf16(table):
    autocast = torch.autocast("cpu", torch.bfloat16)
    model, options = vit(), {"accumulate": 2, "autocast": autocast}
    train(created(model), model, clip_grad=0.01, **options)
    clip = lambda params: dispatch_clip_grad(params, 0.01)  # noqa: E731
    table.compare("timm", "bf16, clipping, accumulation", model, train_by_hand(vit(), clip=clip, **options, **SGD))


def test_resume(table, tmp_path):
    model = vit()
    optimizer = created(model)
    train(optimizer, model, batches=BATCHES[:STEPS])
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pth.tar")
    resumed = vit()
    optimizer = created(resumed)
    resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), optimizer, log_info=False)
    train(optimizer, resumed, batches=BATCHES[STEPS:])
    table.compare("timm", "resume", resumed, train_by_hand(vit(), **SGD))


def test_weight_decay_groups_and_another_base(table):
    model, expected = vit(), vit()
    optimizer = created(model, base=torch.optim.AdamW, lr=1e-3, weight_decay=0.05, eps=1e-4)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    train(optimizer, model)
    groups = create_optimizer_v2(expected, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    train_by_hand(expected, groups, base=torch.optim.AdamW, lr=1e-3, eps=1e-4)
    table.compare("timm", "AdamW, weight-decay groups", model, expected)


def test_layer_decay_and_a_schedule(table):
    def cosine(optimizer):
        return CosineLRScheduler(optimizer, t_initial=6, warmup_t=2, warmup_lr_init=0.01, t_in_epochs=False)

    model, expected = vit(), vit()
    optimizer = created(model, layer_decay=0.7)
    train(optimizer, model, schedule=cosine(optimizer))
    groups = create_optimizer_v2(expected, "momentum", lr=0.1, layer_decay=0.7).param_groups
    groups = [{name: group[name] for name in ("params", "lr_scale", "weight_decay")} for group in groups]
    train_by_hand(expected, groups, schedule=cosine, **SGD)
    table.compare("timm", "layer_decay, CosineLRScheduler", model, expected)


@pytest.mark.parametrize("scaler", [None, native_scaler], ids=["plain", "NativeScaler"])
def test_lookahead(table, scaler):
    model = vit()
    optimizer = create_optimizer_v2(model, "lookahead_fastsam", lr=0.1, rho=0.05)
    assert isinstance(optimizer, Lookahead)
    train(optimizer, model, scaler=scaler and scaler(), accumulate=1, clip_grad=0.5)
    by_norm = lambda params: torch.nn.utils.clip_grad_norm_(params, 0.5)  # noqa: E731
    expected = train_by_hand(vit(), base=lambda p, **o: Lookahead(torch.optim.SGD(p, **o)), clip=by_norm, **SGD)
    table.compare("timm", "lookahead_fastsam" + bool(scaler) * ", NativeScaler", model, expected)


def test_an_overflow_under_lookahead_restores_the_weights():
    model = vit()
    optimizer = create_optimizer_v2(model, "lookahead_fastsam", lr=0.1, rho=0.05)
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def overflows_in_the_second_pass(x, y):
        calls.append(x)
        return F.cross_entropy(model(x), y) * (float("inf") if len(calls) == 2 else 1.0)

    SAMBackward(optimizer, native_scaler())(overflows_in_the_second_pass, *BATCHES[0])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("method", [methods.GSAM(), methods.MomentumSAM()], ids=str)
@pytest.mark.parametrize("lookahead", [False, True], ids=["", "lookahead"])
def test_methods(table, method, lookahead):
    model, expected = vit(), vit()
    optimizer = create_optimizer_v2(model, "lookahead_" * lookahead + "fastsam", lr=0.1, rho=0.05, method=method)
    train(optimizer, model, scaler=native_scaler(), accumulate=2)
    optimizer = FastSAM(expected.parameters(), rho=0.05, method=method, **SGD)
    for i in range(0, len(BATCHES), 2):
        sam_step(expected, lambda m, b: F.cross_entropy(m(b[0]), b[1]), BATCHES[i : i + 2], optimizer)
    mode = f"{type(method).__name__}, NativeScaler, accumulation" + lookahead * ", Lookahead"
    table.compare("timm", mode, model, expected)
