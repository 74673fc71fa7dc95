"""Random numbers and stochastic rounding in plain PyTorch, against integers in plain Python."""

import math

import pytest
import torch
from checks import assert_same_bits, bits
from golden import EDGES, GOLDEN, LOW, random_number, rounded
from scene import STOCHASTIC, Scene, norm_of

from fastsam.backends import reference
from fastsam.backends.rounding import make_keys, random_words, round_stochastically, words_of_draw
from fastsam.distributed import Place
from fastsam.noise import NOISE_WORDS
from fastsam.precision import ascent_seed
from fastsam.spec import RANDOM_WORDS, STATE_SLOTS, Ascent, AscentOptions, Draw

# ---- the random numbers ----


@pytest.mark.parametrize(("key", "number"), GOLDEN.items(), ids=str)
def test_golden_numbers(key, number):
    assert random_number(*key) == number
    *words, element = key
    seed, step, position, draw = words
    words = random_words(make_keys(seed, torch.tensor(step), position, draw // 2), Place(), element, 1)
    assert int(words_of_draw(words, draw)) == number


def test_the_bits_are_fair():
    """Every bit is set half of the time, whichever of the key's words counts."""
    n = 1 << 16
    elements = random_words(make_keys(3, torch.tensor(5), 7, 1), Place(), 0, n)
    steps = random_words(make_keys(3, torch.arange(n), 7, 1), Place(), 0, 1)
    for words in (elements, steps):
        share = torch.stack([(words >> bit & 1).double().mean() for bit in range(32)])
        assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(n)
        assert words.unique().numel() > n - 10
    assert abs(float(torch.corrcoef(torch.stack([elements.double(), steps.double()]))[0, 1])) < 5 / math.sqrt(n)


# ---- one number ----


@LOW
def test_edges(dtype):
    """Zeros, subnormal numbers, the largest, and what lies beyond, with random numbers of all sizes."""
    words = [0, 1, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFF0000, 0xFFFFFFFF]
    for edge in EDGES[dtype]:
        for sign in (1, -1):
            (x,) = torch.tensor([sign * edge]).tolist()
            actual = round_stochastically(torch.full((len(words),), x), torch.tensor(words), dtype)
            assert_same_bits(actual, torch.tensor([rounded(x, r, dtype) for r in words]).to(dtype), f"{x!r}")


@LOW
def test_a_nan_stays_one(dtype):
    assert round_stochastically(torch.full((4,), math.nan), torch.tensor([0, 1, 2**31, 2**32 - 1]), dtype).isnan().all()


@LOW
def test_what_the_dtype_has_is_kept(dtype):
    """All 65,536 of them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for r in (0, 0x80000000, 0xFFFFFFFF):
        assert_same_bits(round_stochastically(every.float(), torch.full(every.shape, r), dtype), every)


def test_no_two_draws_collide():
    """Of one parameter's results in a step, of two parameters, and of the ascents of a step."""
    draws = [Draw.ASCENT, Draw.WEIGHT, *(Draw.STATE + slot for slot in range(STATE_SLOTS)), Draw.METHOD_STATE]
    assert len(set(draws)) == len(draws)
    assert max(draws) // 2 < min(NOISE_WORDS) <= max(NOISE_WORDS) < RANDOM_WORDS
    ascents = [(ascent_seed(5, number), Draw.ASCENT // 2) for number in range(9)]
    others = [(5, word) for word in sorted({draw // 2 for draw in draws if draw != Draw.ASCENT})]
    keys = [make_keys(seed, 3, position, word) for seed, word in ascents + others for position in range(100)]
    assert len(set(keys)) == len(keys)


def test_draws_of_one_word_are_independent():
    """The upper 16 bits, which decide a rounding, of one against those of the other."""
    n = 1 << 16
    words = random_words(make_keys(3, torch.tensor(5), 7, 1), Place(), 0, n)
    one, other = words_of_draw(words, 2), words_of_draw(words, 3)
    assert torch.equal(one, words)
    assert torch.equal(words_of_draw(other, 3), one)
    upper = torch.stack([(draw >> bit & 1).double() for draw in (one, other) for bit in range(16, 32)])
    correlations = torch.corrcoef(upper) - torch.eye(32)
    assert correlations.abs().max() < 5.5 / math.sqrt(n)


def test_pieces_do_not_show(device, monkeypatch):
    """Plain PyTorch makes the random numbers piece by piece."""
    results = []
    for piece in (2**22, 64):
        for name in ("PIECE", "PIECE_ON_CPU"):
            monkeypatch.setattr(f"fastsam.backends.rounding.{name}", piece)
        scene = Scene([(3001,)], (torch.bfloat16, STOCHASTIC), device)
        scene.begin_ascent()
        reference.perturb_(scene.table, Ascent([AscentOptions(0.1, False, False, 1)], norm_of(1.0, device)))
        results.append(bits(scene.params[0]))
    assert torch.equal(*results)
