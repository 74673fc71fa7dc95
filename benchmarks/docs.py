"""The README's GPU table and picture, written from the newest results of a GPU in benchmarks/results/.

python -m benchmarks.docs                write them
python -m benchmarks.docs --check        fail if they are not what would be written
python -m benchmarks.docs --from FILE    take results (.json), or a run's lines (.jsonl), into benchmarks/results/ first
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.implementations import LOOP
from benchmarks.records import OptimizerPart, Results
from benchmarks.report import number, write_json

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- GPU table: make docs-tables -->", "<!-- end of the GPU table -->"
PICTURE = Path("docs/gpu.png")
NONE_YET = "No GPU has been measured yet: `make gpu-report OUT=report` does it, on any NVIDIA GPU."


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something differs")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="results to take over first")
    arguments = parser.parse_args()
    if arguments.source is not None:
        print(f"written: {take_over(arguments.source, ROOT / 'benchmarks' / 'results').relative_to(ROOT)}")
    if arguments.check:
        wrong = differences(ROOT)
        print(*(f"{what}: make docs-tables writes it anew" for what in wrong), sep="\n", end="\n" if wrong else "")
        return 1 if wrong else 0
    write(ROOT)
    return 0


def take_over(source: Path, folder: Path) -> Path:
    """Writes results into ``folder``, under their GPU's name.

    Raises:
        SystemExit: they are not of a GPU, or nothing was measured.
    """
    results = Results.read(source)
    if "gpu" not in results.environment or not results.of(OptimizerPart):
        raise SystemExit(f"{source} has no measurements of a GPU")
    return write_json(results, folder)


def newest(folder: Path) -> Path | None:
    """The results of a GPU that were found last."""
    found = {}
    for path in folder.glob("*.json"):
        environment = json.loads(path.read_text())["environment"]
        if "gpu" in environment:
            found[environment["date"], path.name] = path
    return found[max(found)] if found else None


def write(root: Path) -> None:
    """Puts table and picture in their places."""
    readme = root / "README.md"
    path = newest(root / "benchmarks" / "results")
    readme.write_text(_with_section(readme.read_text(), section(root, path)))
    if path is not None:
        from benchmarks.plot import draw

        draw(Results.read(path), root / PICTURE, note=_digest(path))


def differences(root: Path) -> list[str]:
    """Which of the two are not what :func:`write` would write."""
    path = newest(root / "benchmarks" / "results")
    text = (root / "README.md").read_text()
    wrong = [] if _with_section(text, section(root, path)) == text else ["README.md's GPU table"]
    if path is None:
        return wrong
    # By the results that it was drawn from: another matplotlib draws other bytes.
    drawn = (root / PICTURE).read_bytes() if (root / PICTURE).exists() else b""
    return wrong if _digest(path).encode() in drawn else [*wrong, str(PICTURE)]


def section(root: Path, path: Path | None) -> list[str]:
    """What stands between the markers."""
    if path is None:
        return [NONE_YET]
    results = Results.read(path)
    where, backend = results.environment, results.backends[0]
    parts = [part for part in results.of(OptimizerPart) if part.dtype == "float32"]
    # Of several measurements of the same, the one beside the most others.
    widest: dict[str, OptimizerPart] = {}
    for part in parts:
        if LOOP in part.times and backend in part.times:
            widest[part.name] = max(widest.get(part.name, part), part, key=lambda found: len(found.times))
    rows = [_row(part, backend) for part in widest.values()]
    header = ("parameters", "per-tensor loop, ms", "plain PyTorch, ms", "FastSAM, ms", "x loop", "x plain", "of copy")
    return [
        f"On an {where['gpu']} (driver {where['driver']}, torch {where['torch']}, Triton {where['triton']}),",
        f"{where['date'][:10]}, commit {where['commit']} ([results]({path.relative_to(root)})): backend",
        f"`{backend}`, float32. *Plain PyTorch* is the fastest of `torch._foreach_*` operations over torch's fused",
        "base and, where measured, the same compiled. *Of copy* compares FastSAM's bandwidth, counting 40 (SGD) or",
        "48 (AdamW) bytes per parameter, with that of copying memory.",
        "",
        *table(header, rows),
        "",
        f"![How many times faster than the loop on a GPU]({PICTURE})",
    ]


def _row(part: OptimizerPart, backend: str) -> tuple[str, ...]:
    plain = part.best_plain
    faster, than_plain = part.faster(backend, LOOP), part.faster(backend, plain)
    return (
        part.name + (f" (plain: {plain})" if part.best_plain and "compiled" in part.best_plain else ""),
        number(part.step(LOOP).median),
        "" if plain is None else number(part.step(plain).median),
        number(part.step(backend).median),
        f"{faster:.2f}",
        "" if than_plain is None else f"{than_plain:.2f}",
        f"{part.share_of_copy(backend):.0%}",
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *escaped)]


def _with_section(text: str, lines: list[str]) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
