"""Triton's interpreter for machines without a GPU, several times as fast: without what it does in vain."""

import contextlib
import dataclasses
import os

import torch

THOROUGH = os.environ.get("FASTSAM_THOROUGH", "0") != "0"


def set_up():
    """To be called before the kernels are imported.

    Where there is a GPU, the kernels are compiled, and Triton stays unchanged: its compiler shares code with the
    interpreter.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET", "0") == "0":
        return
    try:
        from triton.language import core
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter
    except ImportError:
        return
    # None of these names is public: where one is missing, tests only take longer.
    for change in (
        lambda: prepare_once(interpreter),
        lambda: call_directly(interpreter),
        lambda: leave_overflows_alone(interpreter.interpreter_builder),
        lambda: remember_numpy_dtypes(interpreter),
        lambda: remember_common_types(TritonSemantic),
        lambda: remember_constants(TritonSemantic),
        lambda: pass_operands_of_one_type(TritonSemantic, core),
        lambda: remember_shapes(core),
        lambda: compare_identities_first(core),
        lambda: unwrap_plain_values_first(core),
    ):
        with contextlib.suppress(AttributeError):
            change()


def runs(backend, device):
    """Whether the interpreter runs ``backend`` on ``device``: at a microsecond per element, a hundred per operation."""
    return backend == "triton" and device.type == "cpu"


def fewer(count, few, backend, device):
    """``few`` instead of ``count`` steps where the interpreter runs them; FASTSAM_THOROUGH=1: all the same."""
    return few if runs(backend, device) and not THOROUGH else count


def prepare_once(interpreter):
    """Left to itself, it replaces the language's functions by its own in every call, and puts them back after it.

    Here they stay replaced: nothing in this process compiles a kernel.
    """
    patch = interpreter._patch_lang
    untouched = interpreter._LangPatchScope()
    prepared = set()

    def patch_once(function):
        if function.__module__ not in prepared:
            prepared.add(function.__module__)
            patch(function)
        return untouched

    interpreter._patch_lang = patch_once


def call_directly(interpreter):
    """Without the check that a function of the language is called from a kernel."""
    semantic = interpreter.interpreter_semantic

    def patch_function(owner, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr  # noqa: B018 (AttributeError where it is called otherwise)
    interpreter._patch_attr = patch_function


def leave_overflows_alone(builder):
    """It looks for an overflow after every sum of integers, and says nothing of one unless it is debugging."""
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def remember_numpy_dtypes(interpreter):
    """It makes a table of all dtypes in order to look one up."""
    find, known = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype):
        name = dtype.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    interpreter._get_np_dtype = get_np_dtype


def remember_common_types(semantic):
    """The dtype that two operands are computed in."""
    find, known = semantic.computation_type_impl, {}

    def computation_type_impl(self, a, a_is_scalar, b, b_is_scalar, div_or_mod):
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in known:
            known[key] = find(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return known[key]

    semantic.computation_type_impl = computation_type_impl


def remember_constants(semantic):
    make, known = semantic.scalar_constant, {}

    def scalar_constant(self, value, dtype):
        key = type(value), repr(value), dtype.name
        if key not in known:
            known[key] = make(self, value, dtype)
        return known[key]

    semantic.scalar_constant = scalar_constant


def pass_operands_of_one_type(semantic, core):
    """Operands of one type of these are computed in it, and have one shape."""
    check, tensor = semantic.binary_op_type_checking_impl, core.tensor
    own = {"fp32", "fp64", "int1", "int32", "int64", "uint32", "uint64"}

    def binary_op_type_checking_impl(self, lhs, rhs, *options, **more):
        if type(lhs) is tensor is type(rhs) and lhs.type is rhs.type and lhs.dtype.name in own:
            return lhs, rhs
        return check(self, lhs, rhs, *options, **more)

    semantic.binary_op_type_checking_impl = binary_op_type_checking_impl


def remember_shapes(core):
    """Each tensor describes its shape in constexprs; a block's types of other elements are made for each cast.

    Types of blocks become the same object where they are equal.
    """
    tensor, block_type = core.tensor, core.block_type
    describe, change, known = tensor.__init__, block_type.with_element_ty, {}

    def __init__(self, handle, kind):
        if kind.name not in known:
            describe(self, handle, kind)
            known[kind.name] = kind, self.shape, self.numel
        self.handle, self.dtype = handle, kind.scalar
        self.type, self.shape, self.numel = known[kind.name]

    def with_element_ty(self, dtype):
        known = self.__dict__.setdefault("_of_elements", {})
        if dtype.name not in known:
            known[dtype.name] = change(self, dtype)
        return known[dtype.name]

    tensor.__init__, block_type.with_element_ty = __init__, with_element_ty


def compare_identities_first(core):
    """Most types that are compared are the same object."""
    for cls in (core.dtype, core.pointer_type):

        def __eq__(self, other, compare=cls.__eq__):
            return self is other or compare(self, other)

        hashed = cls.__hash__
        cls.__eq__, cls.__hash__ = __eq__, hashed


def unwrap_plain_values_first(core):
    unwrap, constexpr = core._unwrap_if_constexpr, core.constexpr
    plain = {core.tensor, core.dtype, core.pointer_type, core.block_type, int, float, bool, str, type(None)}

    def unwrap_if_constexpr(value):
        kind = type(value)
        if kind is constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    core._unwrap_if_constexpr = unwrap_if_constexpr
