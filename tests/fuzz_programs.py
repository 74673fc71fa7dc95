"""What the fuzzer draws: parameters in odd memory, groups, options, and what is then done with them.

A program is plain data. Printed, it is a regression test: ``fuzz_machine.run`` carries it out.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: ``gap`` elements from one to the next, ``pad`` more after each row."""

    transposed: bool = False
    gap: int = 1
    pad: int = 0
    offset: int = 0

    def strides(self, shape):
        strides, step = [0] * len(shape), self.gap
        for i in range(len(shape)) if self.transposed else reversed(range(len(shape))):
            strides[i] = step
            step = step * max(shape[i], 1) + self.pad
        return tuple(strides)


@dataclass(frozen=True)
class Param:
    shape: tuple
    dtype: torch.dtype = torch.float32
    layout: Layout = Layout()


@dataclass(frozen=True)
class Group:
    params: tuple
    options: dict


@dataclass(frozen=True)
class Pass:
    """The gradients of one pass: none for the parameters in ``absent``."""

    seed: int = 0
    absent: frozenset = frozenset()
    layout: Layout = Layout()
    expanded: bool = False
    """Of one element each, repeated by strides of 0."""
    dtype: torch.dtype | None = None
    """Of the odd-numbered parameters' gradients, if not the parameters'."""
    poison: float | None = None
    """The first element of the first gradient."""


# How a step goes, and what becomes of it.
WAYS = (
    "closure",
    "two phases",
    "scaled",  # the second pass's gradients are 1,024 times too large, and a GradScaler says so
    "overflow",  # it says that they are not finite
    "pass 1 fails",
    "pass 2 fails",
    "given up",  # restore() in place of the second phase
    "moved",  # a parameter gets other memory between the phases
)


@dataclass(frozen=True)
class Step:
    way: str
    first: Pass
    second: Pass


@dataclass(frozen=True)
class AddGroup:
    group: Group


@dataclass(frozen=True)
class SetOption:
    group: int
    name: str
    value: object


@dataclass(frozen=True)
class Edit:
    """Every other element of the parameter, halved in place."""

    param: int


@dataclass(frozen=True)
class Cast:
    """The parameter's ``.data`` in another dtype, as ``module.to(dtype)`` does it."""

    param: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Swap:
    """The parameter's ``.data`` in other memory."""

    param: int
    layout: Layout


@dataclass(frozen=True)
class SwapState:
    """The parameter's state in other memory."""

    param: int
    layout: Layout


@dataclass(frozen=True)
class Reload:
    """A new optimizer that loads the state of the present one; ``through_torch``: by way of torch's own class."""

    through_torch: bool


@dataclass(frozen=True)
class Program:
    base: type
    groups: tuple
    operations: tuple
    chunk_size: int = 65536


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
BASES = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

# Small ones in every rank, empty ones among them; and some that end within, at and after a vector or a block.
shapes = st.one_of(
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.sampled_from([(33, 9), (257,), (3, 130), (2, 3, 4, 5)]),
)
layouts = st.builds(
    Layout, st.booleans(), st.sampled_from([1, 1, 1, 2, 3]), st.sampled_from([0, 0, 2]), st.integers(0, 3)
)
absences = st.frozensets(st.integers(0, 8), max_size=3)
poisons = st.sampled_from([*[None] * 9, float("nan"), float("inf"), -float("inf")])


def passes(poisons):
    expanded = st.sampled_from([False, False, False, True])
    dtypes = st.sampled_from([*[None] * 6, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    return st.builds(Pass, st.integers(0, 50), absences, layouts, expanded, dtypes, poisons)


steps = st.builds(Step, st.sampled_from(["closure", *WAYS]), passes(poisons), passes(st.none()))

perturb_options = {
    "rho": st.sampled_from([0.05, 0.0, 0.5, 2.0]),
    "adaptive": st.booleans(),
    "perturb": st.sampled_from([True, True, True, False]),
    "rounding": st.sampled_from(["nearest", "nearest", "stochastic"]),
    "master_weights": st.sampled_from([False, False, True]),
}
shared_options = {
    "lr": st.sampled_from([0.1, 0.0, 0.01]),
    "weight_decay": st.sampled_from([0.0, 0.02]),
    "maximize": st.booleans(),
}
adam_options = {
    **shared_options,
    "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)]),
    "eps": st.sampled_from([1e-8, 1e-3]),
    "amsgrad": st.booleans(),
}
momenta = st.sampled_from(
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
    ]
)


def options_of(base):
    own = st.fixed_dictionaries(perturb_options)
    if base is torch.optim.SGD:
        rest = st.builds(lambda shared, momentum: shared | momentum, st.fixed_dictionaries(shared_options), momenta)
    else:
        rest = st.fixed_dictionaries(adam_options)
    return st.builds(lambda mine, bases: mine | bases, own, rest)


def groups_of(base, dtypes, smallest):
    params = st.builds(Param, shapes, st.sampled_from(dtypes), layouts)
    return st.builds(Group, st.lists(params, min_size=smallest, max_size=4).map(tuple), options_of(base))


def operations_of(base, dtypes):
    indices = st.integers(0, 8)
    options = {**perturb_options, "lr": shared_options["lr"], "weight_decay": shared_options["weight_decay"]}
    settings = [st.builds(SetOption, indices, st.just(name), value) for name, value in options.items()]
    others = [
        st.builds(AddGroup, groups_of(base, dtypes, 1)),
        *settings,
        st.builds(Edit, indices),
        st.builds(Cast, indices, st.sampled_from([*DTYPES, torch.complex128])),
        st.builds(Swap, indices, layouts),
        st.builds(SwapState, indices, layouts),
        st.builds(Reload, st.booleans()),
    ]
    return st.booleans().flatmap(lambda step: steps if step else st.one_of(others))


@st.composite
def programs(draw):
    base = draw(st.sampled_from(BASES))
    # Few dtypes: parameters of one share a table.
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=2))
    groups = (draw(groups_of(base, dtypes, 1)), *draw(st.lists(groups_of(base, dtypes, 0), max_size=2)))
    operations = draw(st.lists(operations_of(base, dtypes), min_size=1, max_size=8))
    # A last step shows what the operation before it has left behind.
    last = draw(steps)
    return Program(base, groups, (*operations, last), draw(st.sampled_from([65536, 64])))
