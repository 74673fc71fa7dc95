"""The numbers of the Triton kernels: sums, roundings, powers."""

import math
from fractions import Fraction

import pytest
import torch
from checks import assert_same_bits
from golden import GOLDEN, LOW
from triton_tables import ASCENT, PRECISIONS, bind, copy_of, make_table, whole_step

from fastsam.backends.rounding import round_stochastically
from fastsam.spec import AdamOptions, AscentForm, Row, SGDOptions, StateNames, Update

PARTIALS_BLOCK = 1024  # kernels/reduce.py


def test_more_partials_than_are_added_at_a_time(triton_gpu, device, monkeypatch):
    monkeypatch.setattr(triton_gpu, "CHUNK_SIZE", 16)
    table = make_table([(16 * PARTIALS_BLOCK + 1,)], torch.float32, device)
    norm = float(triton_gpu.grad_norm([table], [ASCENT]))
    assert len(copy_of(table).chunks) == PARTIALS_BLOCK + 1
    assert norm == pytest.approx(float(table.params[0].grad.double().norm()), rel=1e-12)


@pytest.mark.parametrize("kind", ["ties", "anything"])
def test_bfloat16_is_rounded_to_nearest_even(triton_gpu, device, kind):
    """``w - lr * g`` with lr = -1 is one addition in float32, and one rounding."""
    w = bfloat16_from_bits(torch.arange(0, 2**16, 5))
    w = w[w.isfinite() & (w.abs() > 2.0**-100) & (w.abs() < 2.0**120)]
    if kind == "ties":
        # Half the distance to the next number, away from zero and towards it.
        g = (torch.exp2(w.abs().float().log2().floor() - 8) * torch.tensor([1, -1]).repeat(len(w))[: len(w)]).bfloat16()
    else:
        g = bfloat16_from_bits(torch.randint(0, 2**16, (len(w),)))
    table = make_table([w.shape], torch.bfloat16, device)
    table.params[0].copy_(w)
    table.params[0].grad.copy_(g)
    table.choose_perturbed([False], [])
    triton_gpu.restore_and_update_(table, Update.SGD, [SGDOptions(-1.0, 0.0, 0.0, 0.0, False, False)])
    expected = (w.float() + g.float()).bfloat16()
    actual = table.params[0].cpu()
    assert actual[expected.isnan()].isnan().all()
    assert_same_bits(actual[~expected.isnan()], expected[~expected.isnan()])


def bfloat16_from_bits(bits):
    return (bits.to(torch.int32) << 16).view(torch.float32).bfloat16()


@pytest.mark.parametrize(("key", "number"), GOLDEN.items(), ids=str)
def test_golden_numbers(triton_gpu, device, key, number):
    """Also of elements that no tensor here has."""
    from rounding_kernel import random_bits_kernel

    seed, step, position, operation, element = key
    count = 16
    bits = torch.empty(count, dtype=torch.int64, device=device)
    cells = zip(
        (seed, position, step, element - element % count),
        (torch.float64, torch.int64, torch.float32, torch.int64),
        strict=True,
    )
    arguments = [torch.tensor([cell], dtype=dtype, device=device) for cell, dtype in cells]
    random_bits_kernel[(1,)](bits, *arguments, DRAW=operation, COUNT=count)
    assert int(bits[element % count]) == number


@LOW
def test_any_float32_is_rounded_as_in_plain_pytorch(triton_gpu, device, dtype):
    from rounding_kernel import stochastic_rounding_kernel

    words = torch.randint(0, 2**32, (2, 100_000))
    # Any bits; and what float16 rounds to subnormal numbers and to its largest.
    value = (words[0] - 2**31).to(torch.int32).view(torch.float32)
    value = torch.cat([value, torch.randn(len(value)) * 2.0**-16, 65504 + torch.randn(len(value)) * 8]).to(device)
    random = torch.cat([words[1]] * 3).to(device)
    actual = torch.empty(value.shape, dtype=dtype, device=device)
    stochastic_rounding_kernel[(1,)](actual, value, random, len(value), BLOCK=2048)
    expected = round_stochastically(value, random, dtype)
    assert_same_bits(actual.isnan(), value.isnan())
    assert_same_bits(actual[~value.isnan()], expected[~value.isnan()])


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_small_bfloat16_are_what_they_are(triton_gpu, device, precision):
    """``w - lr * g`` with g = 0 is w; the interpreter's own cast knows no subnormal numbers.

    A NaN stays one; which one, processors decide.
    """
    magnitudes = torch.arange(200)
    w = bfloat16_from_bits(torch.cat([magnitudes, 0x8000 + magnitudes]))
    table = make_table([w.shape], torch.bfloat16, device, precision=precision)
    param = table.params[0]
    param.copy_(w)
    param.grad.zero_()
    whole_step(triton_gpu, table)
    assert_same_bits(param.cpu(), w)


def test_steps_beyond_float32_powers(triton_gpu, device):
    """After a million steps the bias corrections are 1."""
    options = AdamOptions(0.1, 0.9, 0.999, 1e-8, 0.0, False, False, False)
    table = make_table([(3,)], torch.float32, device)
    table.choose_perturbed([False], [])
    param = table.params[0]
    state = {param: {"exp_avg": torch.ones_like(param), "exp_avg_sq": torch.ones_like(param)}}
    state[param]["step"] = torch.tensor(1e6)
    bind(table, state, [StateNames(("exp_avg", "exp_avg_sq"), "step")])
    param.grad.fill_(1.0)
    before = param.clone()
    triton_gpu.restore_and_update_(table, Update.ADAM, [options])
    assert torch.allclose(param, before - 0.1, rtol=1e-6)
    assert float(table.steps[0]) == 1e6 + 1


@pytest.mark.parametrize(("precision", "units"), [("float64", 0), ("float32", 4096)])
def test_powers_are_those_of_whole_numbers(triton_gpu, device, precision, units):
    """Rounded as a fraction is; for float32, off by no more than what float32 cannot see."""
    import triton.language as tl
    from power_kernel import power_kernel

    bases = [0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-7, 1 - 2.0**-53]
    cases = [(base, step) for base in bases for step in (1, 2, 3, 7, 64, 1000, 4097)]
    base, step = (torch.tensor(column, dtype=torch.float64, device=device) for column in zip(*cases, strict=True))
    powers = torch.full_like(base, math.nan)
    power_kernel[(len(cases),)](powers, base, step, DTYPE=getattr(tl, precision))
    for (one, exponent), actual in zip(cases, powers.tolist(), strict=True):
        expected = float(Fraction(one) ** exponent)
        # Smaller errors than this are lost in 1 - power.
        allowed = max(units * math.ulp(expected), 2.0**-63 if expected < 2.0**-11 else 0.0)
        assert abs(actual - expected) <= allowed, (one, exponent)


def test_programs_share_the_chunks_of_a_norm(triton_gpu, device, monkeypatch):
    """Where there are more chunks than the norm has programs."""
    monkeypatch.setattr(triton_gpu, "CHUNK_SIZE", 16)
    monkeypatch.setattr(triton_gpu.kernels, "NORM_PROGRAMS", 5)
    tables = [make_table([(16 * 7 + 1,), (40,)], dtype, device) for dtype in (torch.float32, torch.float64)]
    norm = float(triton_gpu.grad_norm(tables, [ASCENT]))
    expected = math.hypot(*(float(p.grad.double().norm()) for table in tables for p in table.params))
    assert norm == pytest.approx(expected, rel=1e-12)


def test_dots_of_several_chunks_are_added_by_tensor(triton_gpu, device, monkeypatch):
    monkeypatch.setattr(triton_gpu, "CHUNK_SIZE", 16)
    table = make_table([(16 * 3 + 1,), (0,), (16,)], torch.float32, device)
    for _ in range(2):
        dots = triton_gpu.dots(table, AscentForm(y=Row.PARAM), None).cpu()
        pairs = [(p.grad.double().flatten().cpu(), p.double().flatten().cpu()) for p in table.params]
        expected = torch.stack([torch.stack([x @ x, x @ y, y @ y]) for x, y in pairs])
        torch.testing.assert_close(dots, expected, rtol=1e-12, atol=0)


def test_dots_of_more_chunks_than_are_added_at_a_time(triton_gpu, device, monkeypatch):
    from fastsam.kernels import reduce

    if device.type == "cpu":  # compiled code does not ask again
        monkeypatch.setattr(reduce, "PARTIALS_BLOCK", type(reduce.PARTIALS_BLOCK)(8))
    monkeypatch.setattr(triton_gpu, "CHUNK_SIZE", 4)
    count = 17 if device.type == "cpu" else PARTIALS_BLOCK
    table = make_table([(4 * count,), (3,)], torch.float32, device)
    dots = triton_gpu.dots(table, AscentForm(y=Row.PARAM), None).cpu()
    assert len(copy_of(table).chunks) == count + 1
    pairs = [(p.grad.double().flatten().cpu(), p.double().flatten().cpu()) for p in table.params]
    expected = torch.stack([torch.stack([x @ x, x @ y, y @ y]) for x, y in pairs])
    torch.testing.assert_close(dots, expected, rtol=1e-12, atol=0)
