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


def test_refusals_and_exceptions_reach_every_rank(ranks):
    for said in ranks(sharp_minima.refusal):
        assert "double backward does not work through sharded parameters; use hvp='finite_difference'" in said[0]
        assert said[1] == "no luck"
