"""Compiles the Triton kernels ahead of time, without a GPU, and checks what came out.

    python tools/compile_kernels.py                         every kernel, dtype and target, with the installed triton
    python tools/compile_kernels.py --quick                 float32 and bfloat16 for one target of each vendor
    python tools/compile_kernels.py --triton build/triton/3.6.0      with the triton in that folder, too

Writes the PTX and cubin (NVIDIA) or amdgcn and hsaco (AMD) of each specialisation, report.json and a table. Fails where
registers are spilled, or where there are fewer 16-byte accesses to global memory than the paths over full blocks need:
where a compiler cannot prove an alignment it falls back to accesses of one element, in silence.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from text_table import text_table

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = ("float32", "float64", "bfloat16", "float16")
# float32 and float64 are rounded to nearest, and have no masters.
ROUNDED_DTYPES = ("bfloat16", "float16")
QUICK = {"targets": ("sm_90", "gfx942"), "dtypes": ("float32", "bfloat16")}

POINTERS = {
    "addresses_ptr": "*i64",
    "chunks_ptr": "*i64",
    "options_ptr": "*i64",
    "partials_ptr": "*fp64",
    "norm_ptr": "*fp64",
    "steps_ptr": "*fp32",
    "grad_scale_ptr": "*fp32",
    "found_inf_ptr": "*fp32",
    "finished_ptr": "*i32",
    "weights_ptr": "*fp64",
    "positions_ptr": "*i64",
}

WIDE_PTX = re.compile(r"\b(?:ld|st)\.global\S*\.(?:v4\.\w32|v2\.\w64)\b")


class Kernel(NamedTuple):
    """Where a kernel is, and what its paths over full blocks read and write."""

    module: str
    fields: int
    """Options per parameter group."""
    accesses: dict[str, tuple[int, ...]]
    """For each way of rounding: tensors read plus tensors written, for each path. Those of float32 beside a narrower
    parameter count twice."""
    name: str = ""
    """Of the function, if it is another."""
    constants: tuple[tuple[str, int | None], ...] = ()
    """Its own ones: a combination's form."""


KERNELS = {
    "grad_norm_kernel": Kernel("norm", 4, {"nearest": (1, 2)}),  # SAM, ASAM
    "perturb_kernel": Kernel(  # SAM, ASAM
        "perturb", 4, {"nearest": (4, 4), "stochastic": (4, 4), "masters": (5, 5), "stochastic masters": (5, 5)}
    ),
    "restore_kernel": Kernel("update", 0, {"nearest": (2,), "masters": (3,)}),
    "restore_and_sgd_kernel": Kernel(  # restore, without and with momentum
        "update", 7, {"nearest": (2, 3, 5), "stochastic": (2, 3, 5), "masters": (3, 7, 11)}
    ),
    "restore_and_adam_kernel": Kernel(  # restore, Adam, AMSGrad
        "update", 9, {"nearest": (2, 7, 9), "stochastic": (2, 7, 9), "masters": (3, 15, 19)}
    ),
    # Methods beyond SAM, in the forms that read and write the most; each also without y.
    "dots_kernel": Kernel(
        "combination", 0, {"nearest": (3, 2)}, constants=(("X", 1), ("Y", 7), ("MAP", 2), ("CLIMBING", 1))
    ),
    "perturb_by_kernel": Kernel("combination", 0, {"nearest": (5, 4)}, constants=(("X", 1), ("Y", 8), ("MAP", 0))),
    "restore_and_sgd_by": Kernel(
        "update", 7, {"nearest": (2, 7, 9)}, "restore_and_sgd_kernel", (("Y", 7), ("KEEPS", 1))
    ),
    "restore_and_adam_by": Kernel(
        "update", 9, {"nearest": (2, 11, 13)}, "restore_and_adam_kernel", (("Y", 7), ("KEEPS", 1))
    ),
}

Job = tuple[str, str, str, str]  # kernel, rounding, dtype, target


def compile_job(job: Job, out: Path) -> dict[str, Any]:
    """Compiles one specialisation into ``out`` and returns its entry of the report."""
    import importlib

    import torch
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastsam.backends.triton_gpu import WARPS, block_size, compile_options

    name, rounding, dtype_name, target_name = job
    module = importlib.import_module(f"fastsam.kernels.{KERNELS[name].module}")
    kernel = getattr(module, KERNELS[name].name or name)
    dtype = getattr(torch, dtype_name)
    kept = torch.float32 if "masters" in rounding else dtype
    target = GPUTarget(*TARGETS[target_name])
    is_nvidia = target.backend == "cuda"
    plain = rounding == "nearest" and not (KERNELS[name].constants and dtype.itemsize == 2)
    block = block_size(dtype, plain=plain, nvidia=is_nvidia)
    constants = {
        "DTYPE": getattr(tl, dtype_name),
        "KEPT": getattr(tl, str(kept).removeprefix("torch.")),
        "OPMATH": tl.float64 if dtype == torch.float64 else tl.float32,
        "FIELDS": KERNELS[name].fields,
        "BLOCK": block,
    }
    if "stochastic" not in rounding:
        # Only the climb has no other use for the steps.
        constants |= dict.fromkeys(["positions_ptr", "steps_ptr"] if name == "perturb_kernel" else ["positions_ptr"])
    constants |= dict(KERNELS[name].constants or (("weights_ptr", None), ("Y", -1), ("KEEPS", 0)))
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {key: "constexpr" if key in constants else POINTERS.get(key, "i32") for key in kernel.arg_names}
    begin = time.perf_counter()
    options = compile_options(dtype, combined=bool(KERNELS[name].constants), nvidia=is_nvidia)
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)
    seconds = time.perf_counter() - begin

    stem = out / f"triton-{triton.__version__}" / target_name / f"{name}-{rounding.replace(' ', '-')}-{dtype_name}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for kind in ("ptx", "cubin", "amdgcn", "hsaco"):
        if kind in compiled.asm:
            content = compiled.asm[kind]
            files.append(stem.with_suffix(f".{kind}"))
            files[-1].write_bytes(content if isinstance(content, bytes) else content.encode())
    measure = measure_nvidia if is_nvidia else measure_amd
    registers, spills, wide = measure(files)
    # An assembler that unrolls one loop would hide that another is not wide; PTX has each access once.
    written = len(WIDE_PTX.findall(compiled.asm["ptx"])) if "ptx" in compiled.asm else wide
    needed = sum(KERNELS[name].accesses[rounding]) * (block * dtype.itemsize // (16 * WARPS * target.warp_size))
    return {
        "kernel": name,
        "rounding": rounding,
        "variant": f"block {block}, {WARPS} warps",
        "dtype": dtype_name,
        "target": target_name,
        "triton": triton.__version__,
        "registers": registers,
        "spills": spills,
        "wide_found": wide,
        "wide_needed": needed,
        "wide_written": written,
        "file": str(files[-1].relative_to(out)),
        "seconds": round(seconds, 2),
    }


def measure_nvidia(files: list[Path]) -> tuple[int, int, int]:
    """Registers, instructions that spill or reload, 16-byte accesses: from the machine code."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    (cubin,) = (str(file) for file in files if file.suffix == ".cubin")
    usage = subprocess.run(
        [tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    sass = subprocess.run([tools / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    match = re.search(r"\bREG:(\d+)", usage)
    assert match, usage
    return int(match[1]), len(re.findall(r"\b(?:STL|LDL)\b", sass)), len(re.findall(r"\b(?:LDG|STG)\.\S*\b128\b", sass))


def measure_amd(files: list[Path]) -> tuple[int, int, int]:
    """The same from amdgcn's text: vector registers, spilled registers, 16-byte accesses."""
    (text,) = (file.read_text() for file in files if file.suffix == ".amdgcn")
    counts = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+_count):\s+(\d+)", text, re.MULTILINE)}
    wide = re.findall(r"^\s*(?:global|buffer|flat)_(?:load|store)_(?:dwordx4|b128)\b", text, re.MULTILINE)
    return counts["vgpr_count"], counts["vgpr_spill_count"] + counts["sgpr_spill_count"], len(wide)


def compile_share(arguments: argparse.Namespace) -> None:
    """Every n-th of the jobs, one line of JSON each."""
    index, count = map(int, arguments.share.split("/"))
    for job in all_jobs(arguments)[index::count]:
        print(json.dumps(compile_job(job, arguments.out)), flush=True)


def all_jobs(arguments: argparse.Namespace) -> list[Job]:
    """What the arguments ask for."""
    targets = arguments.targets or (QUICK["targets"] if arguments.quick else TARGETS)
    dtypes = arguments.dtypes or (QUICK["dtypes"] if arguments.quick else DTYPES)
    return [
        (kernel, rounding, dtype, target)
        for kernel in arguments.kernels or KERNELS
        for rounding in KERNELS[kernel].accesses
        for dtype in dtypes
        if rounding == "nearest" or dtype in ROUNDED_DTYPES
        for target in targets
    ]


def run_share(folder: str, share: str, arguments: list[str], out: Path) -> list[dict[str, Any]]:
    """``compile_share`` in a process of its own, with the triton in ``folder`` ("": the installed one)."""
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))
    # Interpreted functions cannot be compiled.
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    environment.setdefault("TRITON_CACHE_DIR", str(out / "cache"))
    command = [sys.executable, __file__, *arguments, "--share", share]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise SystemExit(f"compile_kernels: {' '.join(command)} failed")
    return [json.loads(line) for line in process.stdout.splitlines()]


def faults(entry: dict[str, Any]) -> list[str]:
    """What is wrong with one specialisation."""
    found = []
    if entry["spills"]:
        found.append("spills")
    if min(entry["wide_found"], entry["wide_written"]) < entry["wide_needed"]:
        found.append("not all accesses are wide")
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/kernels"), help="where the results go")
    parser.add_argument("--quick", action="store_true", help="one target of each vendor, two dtypes")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--triton", action="append", default=[], help="a folder with another triton; may be repeated")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--targets", nargs="+", choices=TARGETS)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(command_line: list[str]) -> int:
    """Returns the exit status."""
    arguments = parse(command_line)
    arguments.out = arguments.out.resolve()
    if arguments.share:
        compile_share(arguments)
        return 0
    absent = [folder for folder in arguments.triton if not (Path(folder) / "triton").is_dir()]
    for folder in absent:
        print(f"compile_kernels: there is no triton in {folder}: left out", file=sys.stderr)
    folders = ["", *(folder for folder in arguments.triton if folder not in absent)]
    begin = time.perf_counter()
    shares = [(folder, f"{i}/{arguments.jobs}") for folder in folders for i in range(arguments.jobs)]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        parts = pool.map(lambda share: run_share(*share, command_line, arguments.out), shares)
        entries = [entry for part in parts for entry in part]
    entries.sort(key=lambda e: (e["triton"], e["target"], e["kernel"], e["dtype"], e["rounding"]))
    (arguments.out / "report.json").write_text(json.dumps(entries, indent=1) + "\n")
    columns = ("kernel", "rounding", "dtype", "target", "triton", "registers", "spills", "wide_found", "wide_needed")
    print(text_table(columns, entries, [faults(entry) for entry in entries]))
    bad = sum(bool(faults(entry)) for entry in entries)
    versions = ", ".join(sorted({entry["triton"] for entry in entries}))
    print(
        f"\n{len(entries)} specialisations under triton {versions} in {time.perf_counter() - begin:.0f} s, "
        f"{bad} with faults; {arguments.out / 'report.json'}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
