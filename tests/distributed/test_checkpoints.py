"""Checkpoints by torch.distributed.checkpoint: resumed runs end with the bits of undisturbed ones."""

import checkpoints
import pytest
import torch

# Way, base, method, dtype, options of state dicts and of the optimizer.
CASES = {
    "sgd": ("fsdp2", "sgd", "sam", {}),
    "adamw-flat": ("fsdp2", "adamw", "sam", {"flatten": True}),
    "unfused": ("fsdp2", "rmsprop", "gsam", {}),
    "mid-cycle": ("fsdp2", "adamw", "looksam", {}),
    "average": ("fsdp2", "sgd", "friendly", {"flatten": True}),
    "ddp": ("ddp", "adamw", "sam", {}),
    "sequence": ("sequence", "adamw", "friendly", {}),
    "masters": ("fsdp2", "adamw", "sam", {"dtype_name": "bfloat16", "master_weights": True}),
    "stochastic": (
        "fsdp2", "sgd", "sam", {"dtype_name": "bfloat16", "rounding": "stochastic", "rounding_seed": 5}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_ends_with_the_same_bits(ranks, case):
    way, base, method, options = CASES[case]
    assert all(ranks(checkpoints.resume, way, base, method, **options))


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_full_state_dict_is_loaded_in_one_process(ranks, base):
    assert max(ranks(checkpoints.to_one_process, base)) < 1e-12


@pytest.mark.parametrize(("base", "full"), [("adamw", False), ("sgd", True)])
def test_state_of_torchs_own_optimizer_is_loaded(ranks, base, full):
    assert max(ranks(checkpoints.from_plain, base, full)) < 1e-12


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["sam", "looksam"])
def test_saved_on_four_ranks_and_loaded_on_fewer_and_back(pools, tmp_path, method):
    runs = {world: pools(world).run for world in (1, 2, 4)}
    for saved, loaded in ((4, 2), (2, 4), (4, 1), (1, 4)):
        folder = tmp_path / f"{saved}-{loaded}"
        expected, *_ = runs[saved](checkpoints.save_for_others, "adamw", method, folder)
        resumed, *_ = runs[loaded](checkpoints.resume_from_others, "adamw", method, folder)
        assert torch.tensor(resumed).sub(torch.tensor(expected)).abs().max() < 1e-12
