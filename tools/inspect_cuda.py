"""Inspects the compiled CUDA kernels, without a GPU.

    python tools/inspect_cuda.py fastsam/_C_cuda.abi3.so

Prints, for each kernel and GPU, its registers, how many blocks a multiprocessor therefore has at a time and how often
these fill the GPU with ViT-B/16's chunks, the instructions that spill or reload registers, and the 16-byte loads from
and stores to global memory. Fails where registers are spilled, where a kernel is missing, or where there are fewer such
accesses than the loops over vectors have (csrc/cuda/walk.cuh).
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from occupancy import resident, waves
from text_table import text_table

# As kThreads in csrc/cuda/block.cuh.
THREADS = 128

# The 16-byte vectors of 8 narrow elements: one of the parameters' dtype, and two of a wide tensor's (a master, or state
# beside masters).
WIDE = 2


class Walk(NamedTuple):
    """The tensors that one loop of a kernel reads and writes."""

    reads: int
    writes: int
    wide_reads: int = 0
    wide_writes: int = 0

    @property
    def unroll(self) -> int:
        """As kUnrollFor in csrc/cuda/walk.cuh."""
        tensors = self.reads + WIDE * self.wide_reads
        return 4 if tensors == 1 else 2 if tensors <= 3 else 1

    @property
    def accesses(self) -> tuple[int, int]:
        """Its 16-byte loads and stores."""
        loads, stores = self.reads + WIDE * self.wide_reads, self.writes + WIDE * self.wide_writes
        return self.unroll * loads, self.unroll * stores


class Kernel(NamedTuple):
    """A kernel's loops, without masters and with them; and how else it is compiled."""

    walks: tuple[Walk, ...]
    with_masters: tuple[Walk, ...] = ()
    stochastic: bool = False
    stochastic_masters: bool = False


RESTORE, RESTORE_MASTERS = Walk(1, 1), Walk(0, 1, 1)
FORM = Kernel((Walk(3, 2),), (Walk(3, 1, 3, 1),), stochastic=True, stochastic_masters=True)
DOTS = Kernel((Walk(3, 0),), (Walk(3, 0, 2),))
KERNELS = {
    "grad_norm": Kernel((Walk(1, 0), Walk(2, 0))),  # SAM, adaptive
    "perturb": Kernel((Walk(2, 2),), (Walk(2, 1, 1, 1),), stochastic=True, stochastic_masters=True),
    "restore": Kernel((RESTORE,), (RESTORE_MASTERS,)),
    "update SGD": Kernel((RESTORE, Walk(3, 2)), (RESTORE_MASTERS, Walk(2, 1, 2, 2)), stochastic=True),
    "update Adam": Kernel((RESTORE, Walk(5, 4)), (RESTORE_MASTERS, Walk(2, 1, 4, 4)), stochastic=True),
    "descent SGD": Kernel((RESTORE, Walk(6, 3)), (RESTORE_MASTERS, Walk(4, 1, 4, 3)), stochastic=True),
    "descent Adam": Kernel((RESTORE, Walk(8, 5)), (RESTORE_MASTERS, Walk(4, 1, 6, 5)), stochastic=True),
    "prepare": Kernel((RESTORE, Walk(5, 4)), (RESTORE_MASTERS, Walk(3, 3, 3, 1))),
    **{f"perturb {name}": FORM for name in ("identity", "power", "adaptive")},
    **{f"dots {name}": DOTS for name in ("identity", "power", "adaptive")},
}
DTYPES = {"float": "float32", "double": "float64", "c10::BFloat16": "bfloat16", "c10::Half": "float16"}
NARROW = ("bfloat16", "float16")

NAME = re.compile(
    r"(?P<kernel>\w+)_kernel<(?P<type>[\w:]+)(?P<flags>(?:, (?:true|false|\(fastsam::Map\)\d|fastsam::[^,]*Base))*)"
    r"(?:, (?P<capacity>\d+)l?)?>"
)
Entry = dict[str, Any]


def find_tool(name: str) -> str:
    """A program of the CUDA toolkit: in PATH, in CUDA_HOME, or in Triton, which ships some."""
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    if triton := importlib.util.find_spec("triton"):
        folders += [f"{folder}/backends/nvidia/bin" for folder in triton.submodule_search_locations or ()]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise SystemExit(
            f"inspect_cuda: there is no {name}; CUDA_HOME can say where it is, and Triton's package has one"
        )
    return found


def dump(library: Path, what: str) -> str:
    """What cuobjdump says about ``library``, with the names of C++."""
    tool = find_tool("cuobjdump")
    path = os.pathsep.join([str(Path(tool).parent), os.environ["PATH"]])  # it calls nvdisasm
    command = [tool, what, str(library)]
    text = subprocess.run(command, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True, check=True)
    return subprocess.run(["c++filt"], input=text.stdout, stdout=subprocess.PIPE, text=True, check=True).stdout


def name_of(function: str) -> Entry | None:
    """Which kernel a function of the library is."""
    match = NAME.search(function)
    if match is None:
        return None
    flags = re.findall(r"\b(?:true|false)\b", match["flags"])
    kernel, stochastic, masters = match["kernel"], False, False
    if kernel == "restore_and_update":
        base = re.search(r"(Sgd|Adam)Base", match["flags"])
        assert base is not None
        stochastic, masters, descent = (flag == "true" for flag in flags)
        kernel = f"{'descent' if descent else 'update'} {base[1].replace('Sgd', 'SGD')}"
    elif kernel == "restore_and_prepare":
        kernel, masters = "prepare", flags == ["true"]
    elif form := re.search(r"Map\)(\d)", match["flags"]):
        kernel = f"{kernel.partition('_')[0]} {('identity', 'power', 'adaptive')[int(form[1])]}"
        *other, masters = (flag == "true" for flag in flags)
        stochastic = other == [True]
    elif flags:
        *other, masters = (flag == "true" for flag in flags)
        stochastic = other == [True]
    return {
        "kernel": kernel,
        "masters": "masters" if masters else "",
        "rounding": "stochastic" if stochastic else "nearest",
        "dtype": DTYPES[match["type"]],
        "tensors": match["capacity"] or "any",
    }


def by_function(text: str) -> dict[tuple[str, str], list[str]]:
    """The lines about each (target, function)."""
    sections: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    target = function = ""
    for line in text.splitlines():
        if found := re.search(r"\barch = (sm_\w+)", line):
            target = found[1]
        elif found := re.search(r"\bFunction\s*:?\s(.*)", line):
            function = found[1].strip().rstrip(":")
        elif function:
            sections[target, function].append(line)
    return sections


def inspect(library: Path) -> list[Entry]:
    """One entry for each kernel and target."""
    usage = by_function(dump(library, "-res-usage"))
    entries = []
    for (target, function), lines in by_function(dump(library, "-sass")).items():
        if (name := name_of(function)) is None:
            continue
        code = "\n".join(lines)
        usage_of = dict(re.findall(r"\b(\w+):(\d+)", " ".join(usage[target, function])))
        registers = int(usage_of["REG"])
        blocks = resident(target, registers, THREADS)
        entries.append(
            {
                **name,
                "target": target,
                "registers": registers,
                "resident": blocks,
                "waves": waves(target, blocks),
                "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
                "LDG.E.128": len(re.findall(r"\bLDG\.\S*\b128\b", code)),
                "STG.E.128": len(re.findall(r"\bSTG\.\S*\b128\b", code)),
            }
        )
    names = ("kernel", "masters", "rounding", "dtype", "tensors")
    return sorted(entries, key=lambda e: (int(e["target"][3:].rstrip("a")), *(e[name] for name in names)))


def needed(entry: Entry) -> tuple[int, int]:
    """The 16-byte loads and stores of all loops of a kernel."""
    kernel = KERNELS[entry["kernel"]]
    loads, stores = zip(
        *(walk.accesses for walk in (kernel.with_masters if entry["masters"] else kernel.walks)), strict=True
    )
    return sum(loads), sum(stores)


def faults(entry: Entry) -> list[str]:
    """What is wrong with one kernel."""
    loads, stores = needed(entry)
    found = ["spills"] if entry["spills"] else []
    if entry["LDG.E.128"] < loads or entry["STG.E.128"] < stores:
        found.append(f"not all accesses are wide: there should be {loads} and {stores}")
    return found


def variants(name: str, kernel: Kernel) -> list[tuple[str, str, str, str]]:
    """All that a kernel is compiled as: its name, masters, rounding and dtype."""
    found = [(name, "", "nearest", dtype) for dtype in DTYPES.values()]
    for dtype in NARROW:
        found += [(name, "", "stochastic", dtype)] * kernel.stochastic
        found += [(name, "masters", "nearest", dtype)] * bool(kernel.with_masters)
        found += [(name, "masters", "stochastic", dtype)] * kernel.stochastic_masters
    return found


def missing(entries: list[Entry]) -> list[str]:
    """The kernels that are not in the library, for each of its targets."""
    names = ("target", "kernel", "masters", "rounding", "dtype")
    found = {tuple(e[name] for name in names) for e in entries}
    targets = {e["target"] for e in entries}
    wanted = [(target, *v) for target in targets for name, kernel in KERNELS.items() for v in variants(name, kernel)]
    return [" ".join(filter(None, kernel)) for kernel in wanted if kernel not in found] if entries else ["all kernels"]


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    entries = inspect(parser.parse_args().library)
    notes = [faults(entry) for entry in entries]
    columns = (
        "target",
        "kernel",
        "masters",
        "rounding",
        "dtype",
        "tensors",
        "registers",
        "resident",
        "waves",
        "spills",
        "LDG.E.128",
        "STG.E.128",
    )
    print(text_table(columns, entries, notes))
    absent = missing(entries)
    bad = sum(map(bool, notes)) + len(absent)
    print(f"\n{len(entries)} kernels, {bad} with faults", *(f"missing: {name}" for name in absent), sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
