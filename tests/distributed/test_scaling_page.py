"""docs/scaling.md: each row of its table names tests that exist."""

import re
from pathlib import Path

import pytest
from checkout import ROOT

PAGE = ROOT / "docs" / "scaling.md"
NAME = re.compile(r"`(test_\w+\.py)(?:\[(\w+)\]|::(test_\w+))`")

if not PAGE.exists():
    pytest.skip("the tests run without the checkout, against an installed wheel", allow_module_level=True)


def rows():
    """The rows of the table of ways: its first cell and the names of tests in its last."""
    table = PAGE.read_text().split("| way | works |")[1].split("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0]: NAME.findall(row[-1]) for row in cells}


@pytest.mark.parametrize("way", rows())
def test_row_names_tests(way, all_tests):
    names = rows()[way]
    assert names
    for file, word, function in names:
        assert (Path(__file__).parent / file).exists(), file
        found = [name for name in all_tests if name.startswith(f"{file}::")]
        if not found:
            continue  # another part of the suite was asked for
        words = [re.split(r"[-\[\]]", name.partition("::")[2]) for name in found]
        assert any((function or word) in parts for parts in words), (file, word or function)
