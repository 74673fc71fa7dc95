"""The pages: every Python block of the documentation runs, and every link to a file leads somewhere.

The blocks of a page run in order, as one program. They find the names in ``prepared`` below. A comment before a block
exempts it: ``<!-- not run: reason -->``, or ``<!-- needs: package, package -->`` where these are not installed.
"""

import importlib.util
import re

import pytest
import torch
from checkout import ROOT
from torch import nn
from torch.nn import functional as F

PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
PAGES = [page for page in PAGES if page.exists()]
BLOCK = re.compile(
    r"^(?: *<!-- (?P<rule>needs|not run): (?P<reason>.+?) -->\n+)?(?P<indent> *)```python\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")

if not PAGES:
    pytest.skip("the tests run without the checkout, against an installed wheel", allow_module_level=True)


def prepared():
    """What a page's blocks may use without saying where it comes from."""
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    x, y = torch.randn(32, 8), torch.randint(4, (32,))
    return {"torch": torch, "model": model, "x": x, "y": y, "loss_fn": F.cross_entropy, "device": "cpu"}


def is_exempt(rule, reason):
    """Whether a block does not run here."""
    packages = reason.split(", ") if rule == "needs" else []
    return rule == "not run" or any(importlib.util.find_spec(name) is None for name in packages)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page, one_thread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    names = prepared()
    for block in BLOCK.finditer(text):
        if is_exempt(block["rule"], block["reason"]):
            continue
        # Blank lines in front: a traceback then has the page's line numbers.
        code = "\n" * text.count("\n", 0, block.start("code")) + re.sub(
            f"^{block['indent']}", "", block["code"], flags=re.MULTILINE
        )
        exec(compile(code, str(page), "exec"), names)
    assert all(parameter.isfinite().all() for parameter in names["model"].parameters())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_escapes(page):
    """Code is in blocks that are named Python's, and all of these are found."""
    text = page.read_text()
    languages = re.findall(r"^ *`{3,}(\S+)", text, re.MULTILINE)
    assert set(languages) <= {"python", "sh", "{eval-rst}", "{toctree}"}
    assert text.count("```") == 2 * len(languages)  # no block without a name
    assert languages.count("python") == len(BLOCK.findall(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_what_works_names_tests_that_are_there():
    text = (ROOT / "docs" / "what_works.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    files = re.findall(r"`((?:\w+/)+\w+\.py)`", text)
    assert files
    assert not [name for name in files if not ((ROOT / "tests" / name).exists() or (ROOT / name).exists())]
    assert not [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests]


FOLDERS = ("fastsam", "kernels", "csrc", "tools")


def test_contributing_names_every_file_of_code():
    """The table says what each is for; and it names none that is gone."""
    page = ROOT / "CONTRIBUTING.md"
    if not page.exists():
        pytest.skip("the tests run without the checkout")
    table = page.read_text()
    table = table[table.index("| file | purpose |") : table.index("## How a step works")]
    named, folders = set(), []
    for line in re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`([^`]+)`", line):
            before, *inside = re.split(r"[{}]", name)
            for part in [before + middle + inside[1] for middle in inside[0].split(",")] if inside else [name]:
                folder = part.rpartition("/")[0] if "/" in part else folder
                path = ROOT / (part if "/" in part else f"{folder}/{part}")
                assert path.exists(), f"{part} is not there"
                named.add(path)
                folders += [path] if path.is_dir() else []
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.*") if file.suffix not in (".so", ".pyc")]
    files = [
        file for file in files if file.name != "py.typed" and not file.is_relative_to(ROOT / "fastsam" / "kernels")
    ]
    packages = {folder / "__init__.py" for folder in {file.parent for file in named}}
    for file in set(files) - named - packages:
        assert any(file.is_relative_to(folder) for folder in folders), f"{file.relative_to(ROOT)} is not in the table"
