"""What examples/ shows does what it says. (examples/resumable_training.py: test_crash.py.)"""

import copy
import runpy

import pytest
import torch
from checkout import ROOT
from registry import METHODS
from torch import nn
from torch.nn import functional as F
from trajectory import Network, closure_for, detached

from fastsam import FastSAM, methods

EXAMPLES = ROOT / "examples"


def example(name):
    """The names that examples/``name``.py defines."""
    path = EXAMPLES / f"{name}.py"
    if not path.exists():
        pytest.skip("the tests run without the checkout, against an installed wheel")
    pytest.importorskip("sklearn")
    return runpy.run_path(str(path))


@pytest.fixture
def train(backend, device, one_thread):
    """The training of examples/mixed_precision.py."""
    function = example("mixed_precision")["train"]
    return lambda dtype, **options: function(dtype, device=device.type, backend=backend, **options)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision_learns(train, dtype):
    model, accuracy, scaler = train(dtype, epochs=3)
    assert accuracy > 0.5
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert scaler is None or scaler.get_scale() == 2.0**16, "nothing has overflowed"


@pytest.mark.slow
@pytest.mark.thorough
def test_scale_that_is_too_large_comes_down_by_itself(train):
    """Both passes overflow until it fits: no perturbation, no update, half the scale; then training begins."""
    model, accuracy, scaler = train(torch.float16, epochs=3, init_scale=2.0**40)
    assert 1 < scaler.get_scale() < 2.0**30
    assert all(p.isfinite().all() for p in model.parameters())
    assert accuracy > 0.5


def test_adversarial_training_perturbs_inputs_and_weights(backend, device, one_thread):
    """The attack stays in its ball and does harm; both passes see its images, the second at AWP's weights."""
    names = example("adversarial_training")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(device)
    images, labels = torch.rand(20, 1, 8, 8, device=device), torch.randint(10, (20,), device=device)
    worst = names["attack"](model, images, labels)
    assert (worst - images).abs().max() <= names["EPSILON"] + 1e-6
    assert worst.min() >= 0
    assert worst.max() <= 1
    assert F.cross_entropy(model(worst), labels) > F.cross_entropy(model(images), labels) + 0.5
    assert all(p.grad is None for p in model.parameters())

    gamma = 0.1
    optimizer = FastSAM(model.parameters(), method=methods.AWP(gamma), lr=0.1, backend=backend)
    weight = model[1].weight
    before = weight.detach().clone()
    seen = []
    model.register_forward_hook(lambda module, given, _: seen.append((given[0], (weight - before).norm().item())))
    names["train_step"](model, optimizer, images, labels)
    attacks, (proxy, at_weights), (clean, perturbed), (adversarial, perturbed_too) = seen[:-3], *seen[-3:]
    assert len(attacks) == 5
    assert at_weights == 0
    assert adversarial is proxy
    assert clean is images
    assert perturbed == perturbed_too == pytest.approx(gamma * before.norm().item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.thorough
def test_adversarial_training_learns(backend, device, one_thread):
    train = example("adversarial_training")["train"]
    _, clean, attacked = train(epochs=4, backend=backend, device=device.type)
    assert clean > 70
    assert attacked > 20


@pytest.mark.parametrize("name", ["sam", "gsam", "wsam", "looksam-k2", "vasso", "zsharp"])
def test_muon_beside_adamw_is_both_with_sams_gradient(device, name):
    """One norm over all parameters and one second pass; then each optimizer by itself."""
    base = example("muon")["MuonAndAdamW"]
    case, network = METHODS[name], Network(device, 31)
    params, weights, memory = network.params(), network.params(), {}
    matrices, others = [0, 2], [1, 3, 4]
    rates = [{"rho": 0.1, "lr": 0.02 if i in matrices else 0.01} for i in range(5)]
    groups = [
        {"params": [params[i] for i in matrices], "muon": True, "lr": 0.02},
        {"params": [params[i] for i in others], "lr": 0.01},
    ]
    optimizer = FastSAM(groups, base, rho=0.1, method=case.method)
    muon = torch.optim.Muon([weights[i] for i in matrices], lr=0.02)
    adamw = torch.optim.AdamW([weights[i] for i in others], lr=0.01, weight_decay=0.1)
    for step in range(5):
        if step == 3:  # the parts follow what is loaded
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step(closure_for(network, params, optimizer, step))
        gradient = lambda w, step=step: network.gradient(w, step)  # noqa: E731
        given = case.oracle(detached(weights), gradient, rates, memory)
        given, extra = given if isinstance(given, tuple) else (given, [0.0] * 5)
        for w, g in zip(weights, given, strict=True):
            w.grad = g
        muon.step()
        adamw.step()
        with torch.no_grad():
            for w, more in zip(weights, extra, strict=True):
                w.sub_(more)
        # Muon computes in bfloat16: where a rounding differs, it differs by 2^-9 of a step.
        for i, (ours, theirs) in enumerate(zip(params, weights, strict=True)):
            allowed = 2e-3 * 0.02 * (step + 1) if i in matrices else 1e-9
            assert (ours.detach() - theirs.detach()).abs().max() <= allowed + 1e-9 * theirs.abs().max(), (step, i)


def test_language_model_example_trains_by_every_method(device, one_thread):
    """A few steps: the losses are those of untrained models, and methods differ."""
    names = example("language_model")
    losses = {name: names["train_model"](*method, 0, 4, 0.05) for name, method in names["METHODS"].items()}
    assert all(3 < loss < 6 for loss in losses.values())
    assert len(set(losses.values())) >= 3


def test_which_sharpness_drifts_as_the_theorems_say(one_thread):
    """A part of the way: both leave the start, along the line, in their own directions; descent alone stays."""
    names = example("which_sharpness")
    train, start = names["train"], names["START"][0]
    single, alone = train(names["RHO"], True, 1500)[-1], train(0.0, False, 300)[-1]
    assert abs(single - names["SMALLEST_TRACE"]) < 0.1
    assert abs(alone - start) < 0.1
