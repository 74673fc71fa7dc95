"""The examples and ``doctor --distributed``, on two ranks."""

import example_runs
import pytest

pytestmark = pytest.mark.skipif(
    not example_runs.EXAMPLES.exists(), reason="the tests run without the checkout, against an installed wheel"
)


def test_fsdp2_resumes(ranks, tmp_path):
    for whole, resumed in ranks(example_runs.fsdp2, tmp_path):
        assert whole == resumed


def test_ddp(ranks):
    pytest.importorskip("sklearn")
    for accuracy, is_same in ranks(example_runs.ddp):
        assert accuracy > 0.3
        assert is_same


def test_tensor_parallel(ranks):
    assert max(ranks(example_runs.tensor_parallel)) < 1e-5


def test_doctor(ranks):
    (status, report), _ = ranks(example_runs.doctor, False)
    assert status == 0
    assert "FSDP2, AWP" in report
    assert "WRONG" not in report


def test_doctor_finds_what_is_wrong(ranks):
    results = ranks(example_runs.doctor, True)
    assert [status for status, _ in results] == [1, 1]
    assert "WRONG" in results[0][1]


def test_doctor_needs_torchrun(ranks):
    status, said = ranks(example_runs.doctor_alone)[0]
    assert status == 1
    assert "torchrun" in said
