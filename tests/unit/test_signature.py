"""What a step compares: where tensors are, how they look, whether they are the same ones."""

import weakref

import pytest
import torch

from fastsam.tables import signature as fingerprint
from fastsam.tables.signature import Watch, describe


@pytest.fixture(params=["compiled", "plain Python"])
def way(request, monkeypatch):
    """Both ways to ask."""
    if request.param == "plain Python":
        for name in ("_describe", "_identities", "_nested_identities", "_is_unchanged"):
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


def _reshape(tensor):
    tensor.resize_(2, 8)


def _transpose(tensor):
    tensor.t_()


def _give_other_memory(tensor):
    tensor.data = torch.zeros(4, 4)


def _give_other_dtype(tensor):
    tensor.data = tensor.detach().view(torch.int32)


def _give_a_part(tensor):
    tensor.set_(tensor.untyped_storage(), 4, (4, 2), (2, 1))


def _share(tensor):
    tensor.share_memory_()


def _free(tensor):
    tensor.untyped_storage().resize_(0)


@pytest.mark.usefixtures("way")
class TestWatch:
    @pytest.mark.parametrize(
        "change",
        [_reshape, _transpose, _give_other_memory, _give_other_dtype, _give_a_part, _share, _free],
        ids=lambda change: change.__name__.strip("_"),
    )
    @pytest.mark.parametrize("position", [0, 2])
    def test_changed(self, change, position):
        tensors = [torch.zeros(4, 4) for _ in range(3)]
        watch = Watch(tensors)
        assert watch.is_unchanged()
        tensors[0].add_(1)
        assert watch.is_unchanged(), "values may change"
        change(tensors[position])
        assert not watch.is_unchanged()
        assert Watch(tensors).is_unchanged(), "as they are now"

    def test_all_kinds(self):
        kinds = [torch.zeros(()), torch.zeros(0), torch.zeros(3, 0), torch.zeros(2, 3).t(), torch.zeros(3).double()]
        assert Watch(kinds).is_unchanged()
        assert Watch([]).is_unchanged()

    def test_subclass(self):
        """One that may do anything is asked as a Python object."""

        class Kind(torch.Tensor):
            pass

        tensors = [torch.zeros(3), torch.zeros(3).as_subclass(Kind)]
        watch = Watch(tensors)
        assert watch.is_unchanged()
        tensors[1].data = torch.zeros(3).as_subclass(Kind)
        assert not watch.is_unchanged()

    def test_memory_is_released(self):
        tensor = torch.zeros(4)
        memory = weakref.ref(tensor.untyped_storage())
        watch = Watch([tensor])
        del tensor
        assert memory() is not None
        del watch
        assert memory() is None


@pytest.mark.skipif(fingerprint._is_unchanged is None, reason="not compiled")
def test_watches_by_number():
    """A wrong number is no watch, and does no harm."""
    assert not any(fingerprint._is_unchanged(number) for number in (-1, 0, 2**62))
    fingerprint._unwatch(2**62)
    for function in (fingerprint._is_unchanged, fingerprint._unwatch):
        with pytest.raises(TypeError):
            function("1")
        with pytest.raises(OverflowError):
            function(2**64)
