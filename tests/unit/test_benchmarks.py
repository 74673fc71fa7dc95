"""The benchmarks' own parts: what stands beside FastSAM, clocks, rounds."""

# ruff: noqa: E402 - benchmarks/ is a package that is not installed: it has to be put in place before it is imported.

from __future__ import annotations

import math

import pytest
import torch
from checkout import import_benchmarks
from small_models import SHAPES, parameters
from torch import Tensor

import_benchmarks()

from benchmarks import implementations, low_precision, operations
from benchmarks.implementations import COMPILED, FUSED_BASE, LISTS, LISTS_ON_HOST, LOOP
from benchmarks.measure import Gradients
from benchmarks.methods import METHODS, MethodSteps, floor_bytes, period
from benchmarks.networks import VIT, WRN, Network
from benchmarks.operations import BACKENDS
from benchmarks.plain import LoopSAM
from benchmarks.plan import CHUNK_SIZES, plan
from benchmarks.shapes import sizes
from fastsam import FastSAM

# ---- what is measured ----


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("ResNet-18", 62, 11_689_512),
        ("ResNet-50", 161, 25_557_032),
        ("WRN-28-10", 80, 36_479_194),
        ("ViT-B/16", 152, 86_567_656),
        ("GPT-2 small", 148, 124_439_808),
        ("Llama 1B", 146, 1_235_814_400),
        ("4 x 4096^2", 4, 67_108_864),
        ("2,000 x 256", 2000, 512_000),
        ("adapters", 64, 851_968),
    ],
)
def test_models_have_their_published_sizes(model: str, tensors: int, parameters: int) -> None:
    assert sizes(model) == {"model": model, "tensors": tensors, "parameters": parameters}


@pytest.mark.parametrize(("network", "missing"), [(WRN, 0), (VIT, 2 * 768)], ids=["WRN", "ViT"])
def test_trained_models_have_their_published_sizes(network: Network, missing: int) -> None:
    """ViT is without the class token and its position."""
    with torch.device("meta"):
        found = sum(p.numel() for p in network.build().parameters())
    assert found == sizes(network.name)["parameters"] - missing


def test_the_most_important_comes_first() -> None:
    gpu = list(plan("cuda"))
    parts = [case for test, case in gpu if test == "test_optimizer_part"]
    assert [test for test, _ in gpu[:3]] == ["test_operations"] * 3
    assert [case.model for case in parts[:5]] == ["ResNet-50", "ViT-B/16", "2,000 x 256", "Llama 1B", "ResNet-18"]
    assert [case.chunk_size for case in parts[5:]].count(None) == len(parts) - 5 - 3 * len(CHUNK_SIZES)
    # Ranks would need a GPU each.
    assert {test for test, _ in gpu} == {test for test, _ in plan("cpu", dry=True)} - {"test_rank_costs"}
    for device, dry in (("cpu", False), ("cuda", False), ("cpu", True)):
        names = [f"{test} {case.id}" for test, case in plan(device, dry=dry, heavyball=True)]
        assert len(set(names)) == len(names)


def test_every_device_has_its_implementations() -> None:
    names, skipped = implementations.names("cpu")
    assert [name for name in names if name in BACKENDS] + [name for name in skipped if name in BACKENDS]
    assert names[0] == LOOP
    assert names[-1] == FUSED_BASE
    assert COMPILED not in names
    assert COMPILED in implementations.names("cpu", compiled=True)[0]
    assert all(name in implementations.DESCRIPTIONS for name in names if name not in BACKENDS)


def gradient(w: Tensor) -> Tensor:
    """Of sum(w^4 / 4 + sin(w))."""
    return w**3 + w.cos()


def set_gradients(params: list[Tensor]) -> None:
    for p in params:
        p.grad = gradient(p.detach())


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "adaptive"])
def test_loop_is_davda54s_algorithm(adaptive: bool) -> None:
    rho, lr, momentum = 0.05, 0.1, 0.9
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(3, 4), (5,), ()]]
    buffers = [torch.zeros_like(w) for w in weights]
    params = [w.clone().requires_grad_() for w in weights]
    optimizer = LoopSAM(params, torch.optim.SGD, rho=rho, adaptive=adaptive, lr=lr, momentum=momentum)
    for _ in range(4):
        set_gradients(params)
        optimizer.first_step()
        set_gradients(params)
        optimizer.second_step()

        grads = [gradient(w) for w in weights]
        scales = [w.abs() if adaptive else torch.ones_like(w) for w in weights]
        norm = math.sqrt(sum(float((t * g).square().sum()) for t, g in zip(scales, grads, strict=True)))
        perturbed = [w + rho * t**2 * g / (norm + 1e-12) for w, t, g in zip(weights, scales, grads, strict=True)]
        buffers = [momentum * b + gradient(c) for b, c in zip(buffers, perturbed, strict=True)]
        weights = [w - lr * b for w, b in zip(weights, buffers, strict=True)]
        torch.testing.assert_close([p.detach() for p in params], weights, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("base", implementations.BASES)
@pytest.mark.parametrize("name", [LISTS, LISTS_ON_HOST, COMPILED, implementations.PEER_IN_LISTS])
def test_the_others_are_the_same_algorithm(name: str, base: str) -> None:
    if name == implementations.PEER_IN_LISTS:
        pytest.importorskip("pytorch_optimizer")
    gradients = Gradients(SHAPES)
    params, others = parameters(), parameters()
    # Traced, not compiled: what is compared is the algorithm.
    options = {"compiler": "eager"} if name == COMPILED else {}
    mine, loop = implementations.build(name, params, base, **options), implementations.build(LOOP, others, base)
    for _ in range(3):
        gradients.hand_to(params)
        gradients.hand_to(others)
        mine.step()
        loop.step()
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-6)
    torch.compiler.reset()


def test_methods_bytes() -> None:
    """Counted by hand from the operations of each, over SGD with momentum (20 bytes)."""
    expected = {"SAM()": 40, "SAM(p=4)": 40, "SAM(inner_steps=2)": 68, "ASAM()": 44, "GSAM()": 52, "WSAM()": 44}
    expected |= {"LookSAM()": 37.6, "FriendlySAM()": 60, "MomentumSAM()": 40, "AMP()": 40, "AWP()": 44}
    expected |= {"RandomSAM()": 44, "StableSAM()": 44, "VaSSO()": 60, "UnifiedSAM()": 40, "SAGM()": 44, "LESAM()": 40}
    expected |= {"ESAM()": 40, "ZSharp()": 48, "GCSAM()": 48}
    assert {name: floor_bytes(name, "SGD") for name in METHODS} == pytest.approx(expected)
    assert floor_bytes("GSAM()", "AdamW") == expected["GSAM()"] + 8
    assert {name: period(name) for name in METHODS if period(name) > 1} == {"LookSAM()": 5}


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_the_steps_that_are_timed(name: str) -> None:
    params = parameters()
    steps = MethodSteps(name, params, Gradients(SHAPES), "SGD", "foreach")
    ticks = iter(range(1000))
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        # The ascents and the update; each between two ticks.
        assert steps(lambda: next(ticks)) == METHODS[name].ascents + 1
        assert not steps.optimizer.perturbed
        assert not any(map(torch.equal, params, before))


def test_low_precision_is_the_readmes_table() -> None:
    """A fortieth of the weights, and e per weight as the whole has it: what is lost does not depend on their number."""
    scale = math.sqrt(40)
    nearest, stochastic, masters = low_precision.rows(625_000, "reference", rho=low_precision.RHO / scale)
    for (_, length, cosine, projection), expected in (
        (nearest, (0.0304, 0.460, 0.0140)),
        (stochastic, (0.1344, 0.372, 0.0500)),
        (masters, (0.1345, 0.371, 0.0499)),
    ):
        assert (length * scale, cosine, projection * scale) == pytest.approx(expected, rel=0.02)


def test_an_observer_sees_the_block_alone() -> None:
    """It ends with its block, after an exception, too."""
    params = parameters()
    optimizer = FastSAM(params, lr=0.1, backend="foreach")
    Gradients(SHAPES).hand_to(params)
    seen: list[str] = []

    def observed_step() -> None:
        with operations.backends.observe(lambda name, run: (seen.append(name), run())[1]):
            optimizer.first_step()
            raise KeyError

    with pytest.raises(KeyError):
        observed_step()
    optimizer.restore()
    assert seen == ["grad_norm", "perturb_"]
