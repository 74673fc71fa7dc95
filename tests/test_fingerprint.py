"""What a step compares: where tensors are, how they look, whether they are the same ones."""

import pytest
import torch

from fastsam import fingerprint
from fastsam.fingerprint import Fingerprint


@pytest.fixture(params=["guards", "plain Python"])
def guards(request, monkeypatch):
    """Both ways to compare: what torch has for it, and without."""
    if request.param == "plain Python":
        monkeypatch.setattr(fingerprint, "_TensorGuards", None)
    elif fingerprint._TensorGuards is None:
        pytest.skip("this torch has no TensorGuards")


@pytest.mark.usefixtures("guards")
class TestFingerprint:
    def test_other_tensors_that_look_the_same(self):
        shapes = [(2, 3), (), (0,), (5,)]
        look = Fingerprint([torch.empty(shape) for shape in shapes])
        assert look.matches([torch.empty(shape, requires_grad=True) for shape in shapes])
        assert look.matches([torch.nn.Parameter(torch.empty(shape)) for shape in shapes])
        with torch.autocast("cpu"), torch.no_grad():
            assert look.matches([torch.empty(shape) for shape in shapes])

    @pytest.mark.parametrize(
        "other",
        [
            torch.zeros(4, 4, dtype=torch.float64),
            torch.zeros(4, 4, dtype=torch.int32),
            torch.zeros(4, 4, device="meta"),
            torch.zeros(4, 5),
            torch.zeros(16),
            torch.zeros(4, 4).t(),
            torch.zeros(4, 4).to_sparse(),
            torch.zeros(4, 1).expand(4, 4),
            torch.zeros(4, 4, dtype=torch.complex64).conj().imag,
            None,
        ],
        ids=["dtype", "kind", "device", "shape", "dims", "transposed", "sparse", "expanded", "negative", "None"],
    )
    @pytest.mark.parametrize("position", [0, 2])
    def test_one_that_looks_different(self, other, position):
        usual = [torch.zeros(4, 4) for _ in range(3)]
        look = Fingerprint(usual)
        tensors = list(usual)
        tensors[position] = other
        assert not look.matches(tensors)
        assert look.matches(usual)

    def test_no_tensors(self):
        assert Fingerprint([]).matches([])
        assert not Fingerprint([]).matches([None])

    def test_conjugates(self):
        numbers = torch.zeros(3, dtype=torch.complex64)
        assert not Fingerprint([numbers]).matches([numbers.conj()])


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain Python"])
def test_addresses_and_identities(compiled, monkeypatch):
    if not compiled:
        for name in ("_addresses", "_identities", "_nested_identities"):
            monkeypatch.setattr(fingerprint, name, None)
    elif fingerprint._addresses is None or fingerprint._identities is None:
        pytest.skip("not compiled")
    base = torch.zeros(10)
    tensors = [base, None, base[3:], torch.nn.Parameter(base[4:]), torch.zeros(0), base.view(2, 5).t()]
    found = torch.frombuffer(bytearray(fingerprint.addresses(tensors)), dtype=torch.int64)
    assert found.tolist() == [0 if t is None else t.data_ptr() for t in tensors]
    assert fingerprint.addresses([]) == b""
    found = torch.frombuffer(bytearray(fingerprint.identities(tensors)), dtype=torch.int64)
    assert found.tolist() == [id(t) for t in tensors]
    state = {base: {"b": base, "a": 1}, tensors[2]: {}}
    found = torch.frombuffer(bytearray(fingerprint.nested_identities(state, ("a", "b"))), dtype=torch.int64)
    (first, second), (inner, other) = state, state.values()
    assert found.tolist() == [id(first), id(inner), id(inner["a"]), id(base), id(second), id(other), 0, 0]
