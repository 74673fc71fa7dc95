"""Sharpness of a sharded model is that of the same model in one process."""

import pytest
import sharp_minima

pytest.importorskip("hessian_eigenthings")


@pytest.mark.parametrize("way", ["fsdp2", "ddp"])
def test_measures_are_those_of_one_process(ranks, way):
    expected = sharp_minima.expected(2)
    for found, is_back in ranks(sharp_minima.sharded, way):
        assert is_back
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("way", ["fsdp2", "ddp"])
def test_last_ascent_has_the_ranks_losses_and_the_global_norm(ranks, way):
    model, ((x, y), *_) = sharp_minima.model_and_data(2)
    expected = sharp_minima.step_on(model, x, y)
    found = ranks(sharp_minima.last_ascent, way)
    losses, perturbed_losses, norms = zip(*found, strict=True)
    assert norms == pytest.approx([expected[2]] * 2, rel=1e-9)
    assert losses[0] != losses[1]
    assert sum(losses) / 2 == pytest.approx(expected[0], rel=1e-9)
    assert sum(perturbed_losses) / 2 == pytest.approx(expected[1], rel=1e-9)


def test_refusals_and_exceptions_reach_every_rank(ranks):
    for said in ranks(sharp_minima.refusal):
        assert "double backward does not work through sharded parameters; use hvp='finite_difference'" in said[0]
        assert said[1] == "no luck"
