"""What a step compares: where tensors are, how they look, whether they are the same ones."""

import pytest
import torch

from fastsam.tables import signature as fingerprint
from fastsam.tables.signature import describe


@pytest.fixture(params=["compiled", "plain Python"])
def way(request, monkeypatch):
    """Both ways to ask."""
    if request.param == "plain Python":
        for name in ("_describe", "_identities", "_nested_identities"):
            monkeypatch.setattr(fingerprint, name, None)
    elif fingerprint._describe is None:
        pytest.skip("not compiled, or a torch without DLPack's interface for C")


def as_numbers(found):
    return torch.frombuffer(bytearray(found), dtype=torch.int64).tolist() if found else []


@pytest.mark.usefixtures("way")
class TestDescribe:
    def test_other_tensors_that_look_the_same(self):
        shapes = [(2, 3), (), (0,), (5,)]
        metadata = describe([torch.empty(shape) for shape in shapes]).metadata
        assert describe([torch.empty(shape, requires_grad=True) for shape in shapes]).metadata == metadata
        assert describe([torch.nn.Parameter(torch.empty(shape)) for shape in shapes]).metadata == metadata
        with torch.autocast("cpu"), torch.no_grad():
            assert describe([torch.empty(shape) for shape in shapes]).metadata == metadata

    @pytest.mark.parametrize(
        "other",
        [
            torch.zeros(4, 4, dtype=torch.float64),
            torch.zeros(4, 4, dtype=torch.int32),
            torch.zeros(4, 4, dtype=torch.bfloat16),
            torch.zeros(4, 4, device="meta"),
            torch.zeros(4, 5),
            torch.zeros(16),
            torch.zeros(4, 4).t(),
            torch.zeros(4, 4).to_sparse(),
            torch.zeros(4, 1).expand(4, 4),
            torch.zeros(4, 4, dtype=torch.complex64).conj().imag,
            None,
        ],
        ids=[
            "dtype",
            "kind",
            "half",
            "device",
            "shape",
            "dims",
            "transposed",
            "sparse",
            "expanded",
            "negative",
            "None",
        ],
    )
    @pytest.mark.parametrize("position", [0, 2])
    def test_one_that_looks_different(self, other, position):
        usual = [torch.zeros(4, 4) for _ in range(3)]
        tensors = list(usual)
        tensors[position] = other
        assert describe(tensors).metadata != describe(usual).metadata

    @pytest.mark.parametrize("shape", [(3,), (), (1, 1), (2, 3)], ids=str)
    def test_conjugates_and_negatives(self, shape):
        numbers = torch.zeros(shape, dtype=torch.complex64)
        assert describe([numbers]).metadata != describe([numbers.conj()]).metadata
        plain, negative = torch.zeros(shape), numbers.conj().imag
        if negative.numel() == 1:  # a single element may have any strides
            negative = negative.as_strided(plain.shape, plain.stride())
        assert negative.is_neg()
        assert describe([negative]).metadata != describe([plain]).metadata

    def test_no_tensors(self):
        assert describe([]).addresses == b""
        assert describe([]) == describe([])
        assert describe([]).metadata != describe([None]).metadata

    def test_addresses(self):
        base = torch.zeros(10)
        tensors = [base, None, base[3:], torch.nn.Parameter(base[4:]), torch.zeros(0), base.view(2, 5).t()]
        assert as_numbers(describe(tensors).addresses) == [0 if t is None else t.data_ptr() for t in tensors]

    def test_identities(self):
        base = torch.zeros(10)
        objects = [base, None, base[3:], "text"]
        assert as_numbers(fingerprint.identities(objects)) == [id(x) for x in objects]
        state = {base: {"b": base, "a": 1}, objects[2]: {}}
        (first, second), (inner, other) = state, state.values()
        found = as_numbers(fingerprint.nested_identities(state, ("a", "b")))
        assert found == [id(first), id(inner), id(inner["a"]), id(base), id(second), id(other), 0, 0]


@pytest.mark.parametrize("wrong", [[3], [torch.zeros(2), "text"], [object()]], ids=["int", "str", "object"])
def test_what_is_no_tensor_is_refused(wrong):
    if fingerprint._describe is None:
        pytest.skip("not compiled, or a torch without DLPack's interface for C")
    with pytest.raises(TypeError, match="tensors"):
        describe(wrong)
