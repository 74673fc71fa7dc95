"""Where steps of several passes, long runs and restarts have gone silently wrong elsewhere."""

import copy
import pickle

import pytest
import torch
from small_models import X, closure_of, make_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fastsam import FastSAM, methods

pytestmark = pytest.mark.parametrize("backend", ["reference", "foreach", "native"])

METHODS = [methods.SAM(), methods.LookSAM(k=2), methods.FriendlySAM()]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)


@every_method
def test_a_pickled_state_has_the_size_of_its_tensors(backend, method):
    """Views of one allocation would each be pickled with all of it."""
    params = [nn.Parameter(torch.ones(1000)) for _ in range(20)]
    optimizer = FastSAM(params, torch.optim.AdamW, lr=0.1, method=method, backend=backend)

    def closure():
        for param in params:
            param.grad = param.detach().clone()

    optimizer.step(closure)
    saved = optimizer.state_dict()
    size = sum(v.nbytes for entries in saved["state"].values() for v in entries.values())
    assert len(pickle.dumps(saved)) < 1.5 * size
    for entries in optimizer.state.values():
        for value in entries.values():
            value.data = value.data.clone()
    optimizer.step(closure)
    assert all(float(entries["step"]) == 2 for entries in optimizer.state.values())


@pytest.mark.parametrize("ways", ["closure", "closures"])
def test_both_passes_of_each_micro_batch_have_the_same_random_numbers(backend, ways):
    w, drawn = nn.Parameter(torch.ones(50)), []
    optimizer = FastSAM([w], lr=0.1, replay_rng=True, backend=backend)

    def closure():
        optimizer.zero_grad()
        drawn.append(torch.rand(50))
        (w * drawn[-1]).sum().backward()

    optimizer.step(closure) if ways == "closure" else optimizer.step(closures=[closure, closure])
    assert len(drawn) == (2 if ways == "closure" else 4)
    assert all(torch.equal(one, other) for one, other in zip(drawn[::2], drawn[1::2], strict=True))
    assert ways == "closure" or not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("options", [{"method": methods.LookSAM(k=3)}, {"interval": 3}], ids=str)
def test_a_new_group_put_first_does_not_restart_the_count(backend, options):
    params, passes = [nn.Parameter(torch.ones(3)) for _ in range(2)], []
    optimizer = FastSAM(params[:1], lr=0.1, backend=backend, **options)

    def closure():
        passes[-1] += 1
        for param in params:
            param.grad = param.detach().clone()

    for number in range(6):
        passes.append(0)
        optimizer.step(closure)
        if number == 1:
            optimizer.add_param_group({"params": params[1:]})
            optimizer.param_groups.reverse()
    assert passes == [2, 1, 1, 2, 1, 1]


NORMS = [nn.BatchNorm2d, lambda n: nn.GroupNorm(2, n), lambda n: nn.InstanceNorm2d(n, affine=True), nn.LayerNorm]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("make", NORMS, ids=["batch", "group", "instance", "layer"])
def test_norm_layers_only_perturbs_weights_and_biases(backend, make, beside):
    """As the authors of SAM-ON do (mueller-mp/SAM-ON, sam_on.py)."""
    norm = make(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, *([nn.BatchNorm2d(4)] if beside else []))
    optimizer = FastSAM(methods.norm_layers_only(model), lr=0.1, rho=0.5, backend=backend)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.first_step()
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    optimizer.restore()
    assert moved == {name for name in before if not name.startswith("0.")}


INNER = [methods.SAM(inner_steps=2, inner_lr=1.0), methods.SAM(inner_steps=3, inner_lr=0.8)]


@pytest.mark.parametrize("method", INNER, ids=["2 steps", "3 steps"])
def test_a_dropped_layer_does_not_leave_the_ball(backend, method):
    """Its gradient is missing in the later passes; what was perturbed before still counts."""
    params, distances = [nn.Parameter(torch.ones(3)) for _ in range(2)], []
    optimizer = FastSAM(params, lr=0.1, rho=0.3, method=method, backend=backend)

    def closure():
        origin = [p.detach().clone() for p in params] if not optimizer.perturbed else closure.origin
        closure.origin = origin
        moved = [p.detach() - o for p, o in zip(params, origin, strict=True)]
        distances.append(float(torch.cat(moved).norm()))
        params[0].grad = torch.ones(3)
        params[1].grad = None if optimizer.perturbed else torch.ones(3)

    for _ in range(2):
        optimizer.step(closure)
    assert max(distances) <= 0.3 * 1.0001
    assert max(distances) > 0.2


STATEFUL = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


@every_method
@pytest.mark.parametrize("base", STATEFUL)
def test_distributed_checkpoints_before_the_first_step(backend, base, method):
    """torch.distributed.checkpoint calls ``step()`` with zero gradients and lr 0 to make a fresh optimizer's state."""

    def make():
        cls, options = STATEFUL[base]
        model = make_model()
        return model, FastSAM(model.parameters(), cls, lr=0.05, method=method, backend=backend, **options)

    model, optimizer = make()
    get_optimizer_state_dict(model, optimizer)
    for param, fresh in zip(model.parameters(), make_model().parameters(), strict=True):
        assert torch.equal(param, fresh)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model))
    optimizer.zero_grad()
    saved, weights = copy.deepcopy((get_optimizer_state_dict(model, optimizer), model.state_dict()))
    resumed_model, resumed = make()
    resumed_model.load_state_dict(weights)
    set_optimizer_state_dict(resumed_model, resumed, saved)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, model))
        resumed.step(closure_of(resumed, resumed_model))
    for one, other in zip(resumed_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_wsam_over_an_unfused_base_under_a_scaler(backend):
    """What is subtracted besides the base's step is unscaled, too."""

    def train(scale):
        model = make_model()
        options = {"lr": 0.01, "method": methods.WSAM(), "backend": backend}
        optimizer = FastSAM(model.parameters(), torch.optim.RMSprop, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        for _ in range(2):
            scaler.scale(model(X).square().sum()).backward()
            optimizer.first_step()
            scaler.scale(model(X).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model.parameters()

    for one, other in zip(train(1024.0), train(1.0), strict=True):
        torch.testing.assert_close(one, other)
