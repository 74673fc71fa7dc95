"""csrc/spec.h repeats fastsam/spec.py's numbers."""

from enum import EnumMeta

import pytest

from fastsam import spec

SHARED = ("ROWS", "STATE_SLOTS", "NONE", "PERTURBATION", "RANDOM_WORDS")
"""The numbers of spec.py that kernels know."""


def numbers():
    """Every number that spec.py shares, by its name: of options, the place of each field."""
    found = {name: getattr(spec, name) for name in SHARED}
    for name, value in vars(spec).items():
        if isinstance(value, EnumMeta) and value.__module__ == spec.__name__:
            found |= {f"{name}.{member.name}": int(member) for member in value}
        elif name.endswith("Options") and isinstance(value, type):
            found |= {f"{name}.{field}": place for place, field in enumerate(value._fields)}
    return found


def test_the_compiled_extension_has_the_same_numbers():
    compiled = pytest.importorskip("fastsam._C", reason="the compiled extension is not installed")
    assert compiled.spec() == numbers()


def test_rows_are_counted():
    assert max(spec.Row) + 1 == spec.ROWS
    assert spec.Row.STATE + spec.STATE_SLOTS == spec.Row.MASTER
    assert spec.Draw.STATE + spec.STATE_SLOTS == spec.Draw.METHOD_STATE < 2 * spec.RANDOM_WORDS
