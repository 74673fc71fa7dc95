"""Takes text of files outside docs/ into pages.

A line ``<!-- include ../CHANGELOG.md -->`` becomes the file's text, ``<!-- include ../README.md: GPU table -->`` the
text between its comments ``<!-- GPU table ... -->`` and ``<!-- end of the GPU table -->``. Links in that text lead to
the pages; files that are no pages, such as examples, are copied into the site by MyST.
"""

import re
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

INCLUDE = re.compile(r"^<!-- include \.\./(\S+?)(?:: (.+))? -->$", re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)")


def setup(app):
    """Registers the replacement with Sphinx."""
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def read(app, page, content):
    """Replaces a page's ``include`` lines; Sphinx then rebuilds the page when a file changes."""
    content[0] = INCLUDE.sub(partial(_included, app), content[0])


def _included(app, match):
    name, section = match.groups()
    app.env.note_dependency(str(ROOT / name))
    text = (ROOT / name).read_text()
    if section:
        text = re.search(rf"<!-- {section}\b.*?-->(.*)<!-- end of the {section} -->", text, re.DOTALL)[1]
    return LINK.sub(_link, text)


def _link(match):
    path, anchor = match[1], match[2] or ""
    if path.startswith("docs/"):
        return f"]({path.removeprefix('docs/')}{anchor})"
    return f"]({PAGES.get(path) or f'path:../{path}'}{anchor})"
