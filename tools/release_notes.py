#!/usr/bin/env python3
"""release_notes.py TAG DIST: prints the changelog's part about a release, after checks.

The tag, the version in pyproject.toml, the newest release in CHANGELOG.md and the files in DIST must agree.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(tag: str, folder: str) -> None:
    """Prints the notes, or exits with what does not agree."""
    project = (ROOT / "pyproject.toml").read_text()
    version, repository = (
        re.search(f'^{name} = "(.+)"', project, re.MULTILINE)[1] for name in ("version", "repository")
    )
    _, title, notes = re.split(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), maxsplit=2, flags=re.MULTILINE)[:3]
    files = sorted(path.name for path in Path(folder).iterdir())
    if ".example/" in repository:
        sys.exit(f"repository in pyproject.toml is {repository}, which leads nowhere")
    if tag != f"v{version}":
        sys.exit(f"the tag is {tag}, the version in pyproject.toml {version}")
    if title.split()[0] != version:
        sys.exit(f"the first release in CHANGELOG.md is {title!r}, not {version}")
    if wrong := [name for name in files if not name.startswith(f"fastsam_optim-{version}")]:
        sys.exit(f"not of version {version}: {', '.join(wrong)}")
    if not any(name.endswith(".tar.gz") for name in files) or not any("manylinux_2_28" in name for name in files):
        sys.exit(f"a source distribution and a manylinux_2_28 wheel are needed, there are: {', '.join(files)}")
    print(re.split(r"^## ", notes, maxsplit=1, flags=re.MULTILINE)[0].strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
