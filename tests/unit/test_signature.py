"""What a step compares: where tensors are, how they look, whether they are the same ones."""

import weakref

import pytest
import torch

from fastsam.tables import signature as fingerprint
from fastsam.tables.signature import ParameterReader, Watch, describe

NOT_COMPILED = "not compiled, or a torch without DLPack's interface for C"
compiled_only = pytest.mark.skipif(fingerprint._read_grads is None, reason=NOT_COMPILED)


@pytest.fixture(params=["compiled", "plain Python"])
def way(request, monkeypatch):
    """Both ways to ask."""
    if request.param == "plain Python":
        for name in ("_describe", "_read_grads", "_identities", "_nested_identities", "_is_unchanged"):
            monkeypatch.setattr(fingerprint, name, None)
    elif fingerprint._describe is None:
        pytest.skip(NOT_COMPILED)


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

    def test_what_is_known(self):
        """The result does not depend on it; what is equal may be the same object."""
        tensors = [torch.zeros(2, 3), None, torch.zeros(()), torch.zeros(4, 2).t(), torch.zeros(0)]
        whole = describe(tensors)
        for known in ([], tensors, tensors[:2], [*tensors, torch.zeros(1)], [None] * 5, tensors[::-1]):
            assert describe(tensors, describe(known)) == whole
        again = describe(tensors, whole)
        if fingerprint._describe is not None:
            assert again.addresses is whole.addresses
            assert again.metadata is whole.metadata

    def test_identities(self):
        base = torch.zeros(10)
        objects = [base, None, base[3:], "text"]
        assert as_numbers(fingerprint.identities(objects)) == [id(x) for x in objects]
        state = {base: {"b": base, "a": 1}, objects[2]: {}}
        (first, second), (inner, other) = state, state.values()
        found = as_numbers(fingerprint.nested_identities(state, ("a", "b")))
        assert found == [id(first), id(inner), id(inner["a"]), id(base), id(second), id(other), 0, 0]


@pytest.mark.parametrize("wrong", [[3], [torch.zeros(2), "text"], [object()]], ids=["int", "str", "object"])
@compiled_only
def test_what_is_no_tensor_is_refused(wrong):
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


def _with_grads(*shapes):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def _read_twice(reader):
    """What the second reading finds, as one that knows the gradients."""
    reader.read_grads()
    reader.expect_grads(usable=True)
    return reader.read_grads()


@pytest.mark.usefixtures("way")
class TestParameterReader:
    SHAPES = ((4, 4), (), (3, 0), (2, 1, 2, 1, 2, 3), *[(5,)] * 30)

    def test_gradients_and_their_addresses(self):
        params = _with_grads(*self.SHAPES)
        params[-2].grad = None
        reader = ParameterReader(params)
        first, unexpected = reader.read_grads()
        assert unexpected is None, "nothing is known of them"
        grads, addresses = _read_twice(reader)
        assert all(a is b is p.grad for a, b, p in zip(first, grads, params, strict=True))
        assert as_numbers(addresses) == [0 if p.grad is None else p.grad.data_ptr() for p in params]

    def test_other_gradients_of_the_same_kind(self):
        params = _with_grads(*self.SHAPES)
        reader = ParameterReader(params)
        before = _read_twice(reader)[1]
        params[7].grad = torch.full_like(params[7], 2)
        grads, after = reader.read_grads()
        assert grads[7] is params[7].grad
        assert after != before
        assert as_numbers(after)[7] == params[7].grad.data_ptr()

    @pytest.mark.parametrize(
        "other",
        [None, torch.ones(5, dtype=torch.float64), torch.ones(10)[::2], torch.ones(4), torch.ones(5).to_sparse()],
        ids=["None", "dtype", "strides", "shape", "sparse"],
    )
    def test_gradients_of_another_kind(self, other):
        params = _with_grads(*self.SHAPES[:3], (5,), (5,))
        reader = ParameterReader(params)
        _read_twice(reader)

        class Owner(torch.Tensor):
            """torch would refuse most of these; a subclass need not."""

            grad = other

        params[3] = params[3].detach().as_subclass(Owner)
        grads, addresses = reader.read_grads()
        assert grads[3] is other
        assert addresses is None

    def test_unusable_gradients_are_never_expected(self):
        reader = ParameterReader(_with_grads((4,)))
        for _ in range(2):
            assert reader.read_grads()[1] is None
            reader.expect_grads(usable=False)

    def test_gradient_that_loses_its_memory(self):
        params = _with_grads((4,), (4,))
        reader = ParameterReader(params)
        _read_twice(reader)
        params[1].grad.untyped_storage().resize_(0)
        assert reader.read_grads()[1] is None

    @pytest.mark.parametrize("change", [_give_other_memory, _give_a_part, _free], ids=lambda c: c.__name__.strip("_"))
    @pytest.mark.parametrize("position", [0, 2])
    def test_parameter_that_has_changed(self, change, position):
        params = _with_grads((4, 4), (4, 4), (4, 4))
        reader = ParameterReader(params)
        assert _read_twice(reader) is not None
        with torch.no_grad():
            params[0].add_(1)
        assert reader.read_grads() is not None, "values may change"
        assert reader.is_unchanged()
        with torch.no_grad():
            change(params[position])
        assert reader.read_grads() is None
        assert not reader.is_unchanged()

    def test_objects_that_are_gone(self):
        """Their addresses are only prefetched."""
        params = _with_grads(*self.SHAPES)
        reader = ParameterReader(params)
        _read_twice(reader)
        for i, param in enumerate(params):
            torch.utils.swap_tensors(param, _with_grads(self.SHAPES[i])[0])
        assert reader.read_grads() is None
        assert ParameterReader(params).read_grads()[0] == [param.grad for param in params]

    def test_gradient_that_raises(self):
        class Owner(torch.Tensor):
            @property
            def grad(self):
                raise ZeroDivisionError

        reader = ParameterReader([torch.zeros(3), torch.zeros(3).as_subclass(Owner)])
        with pytest.raises(ZeroDivisionError):
            reader.read_grads()


@compiled_only
def test_what_is_the_same_is_the_same_object():
    """The compiled function then copies nothing."""
    reader = ParameterReader(_with_grads(*TestParameterReader.SHAPES))
    _, addresses = _read_twice(reader)
    assert reader.read_grads()[1] is addresses


@compiled_only
def test_what_the_compiled_reader_refuses():
    read = fingerprint._read_grads
    params, known, api = _with_grads((3,)), describe([]), fingerprint._exchange_api
    with pytest.raises(ValueError, match="40 bytes"):
        read(params, known, known, bytearray(39), torch.Tensor, api)
    with pytest.raises(TypeError):
        read(tuple(params), known, known, bytearray(40), torch.Tensor, api)
    with pytest.raises(TypeError, match="tensors"):
        read([type("Owner", (), {"grad": None})()], known, known, bytearray(40), torch.Tensor, api)
    with pytest.raises(AttributeError):
        read([3], known, known, bytearray(40), torch.Tensor, api)
    with pytest.raises(ValueError, match="PyCapsule"):
        read(params, known, known, bytearray(40), torch.Tensor, None)


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
