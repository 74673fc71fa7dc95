"""Compiles the Triton kernels ahead of time, without a GPU, and checks what came out.

    python tools/compile_kernels.py                         every kernel, dtype and target, with the installed triton
    python tools/compile_kernels.py --quick                 float32 and bfloat16 for one target of each vendor
    python tools/compile_kernels.py --triton build/triton/3.6.0      with the triton in that folder, too
    python tools/compile_kernels.py -k 'dots .*masters.*sm_90'       what the pattern is found in: kernel, precision,
                                                                     dtype and target, as in a row of the table

The list of kernels and their options are the launcher's own (``fastsam.backends.triton_kernels``). Writes the PTX and
cubin (NVIDIA) or amdgcn and hsaco (AMD) of each specialisation, report.json and a table; ``resident`` is how many
programs a multiprocessor has at a time, ``waves`` how often these fill the GPU with ViT-B/16's chunks, ``lanes`` how
many scalars AMD's compiler has put into lanes of a vector register. Fails where registers are spilled to memory, or
where there are fewer 16-byte accesses to global memory than the paths over full blocks need: where a compiler cannot
prove an alignment it falls back to accesses of one element, in silence.
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
from typing import Any

from occupancy import resident, waves
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
PRECISIONS = {
    "nearest": {},
    "stochastic": {"stochastic": True},
    "masters": {"masters": True},
    "stochastic masters": {"stochastic": True, "masters": True},
}
QUICK = {"targets": ("sm_90", "gfx942"), "dtypes": ("float32", "bfloat16")}

# A wave of gfx942 has 102 scalar registers, and no option gives it more. What does not fit is moved to lanes of a
# vector register, which costs an instruction for each use but no memory. The most that is known are 20: "update ADAM
# FIRST_GRAD decoupled", stochastic float16, Triton 3.9.0; none of these instructions is in a loop over whole blocks.
MOST_LANES = 20

WIDE_PTX = re.compile(r"\b(?:ld|st)\.global\S*\.(?:v4\.\w32|v2\.\w64)\b")

Job = tuple[str, str, str, bool, int]
"""Target, dtype, precision, whether in all forms, and which of the kernels that these have."""


def every_kernel(target: str, dtype: str, precision: str, *, all_forms: bool = True) -> list[tuple[str, Any]]:
    """All that the launcher may ask for, by plain SAM and by the methods' forms: labels and kernels.

    ``all_forms`` False: of the forms, those that read and write the most.
    """
    import torch

    from fastsam.backends import triton_kernels as kernels
    from fastsam.spec import NONE, AscentForm, DescentForm, Update

    kind = kernels.Kind(getattr(torch, dtype), nvidia=target.startswith("sm_"), **PRECISIONS[precision])
    forms = method_forms() if all_forms else largest_forms()
    ascents = [form for form in forms if isinstance(form, AscentForm)]
    descents = [form for form in forms if isinstance(form, DescentForm)]
    found = [("norm", kernels.norm(kind))]
    # For the dots, what else a descent's form names does not matter.
    measured = {*ascents, *(DescentForm(form.y) for form in descents if form.y != NONE)}
    found += [("dots", kernels.dots(kind, form)) for form in sorted(measured, key=repr)]
    found += [("perturb", kernels.perturb(kind, form)) for form in (None, *ascents)]
    found += [("update", kernels.update(kind, base, form)) for base in Update for form in (None, *descents)]
    return [(f"{label} {describe(kernel)}".strip(), kernel) for label, kernel in found]


def method_forms() -> list[Any]:
    """The forms of every method of ``fastsam.methods``, in each of its variants."""
    from fastsam import methods

    variants = [
        *(kind() for kind in map(methods.__dict__.get, methods.__all__) if is_method(kind)),
        methods.SAM(p=4),
        methods.SAM(inner_steps=2),
        methods.WSAM(decouple=False),
        methods.Direction(lambda params, grads: grads),
    ]
    both = (False, True)
    forms = {form for method in variants for again in both for form in (method.ascent_form(again),)}
    forms |= {form for method in variants for ascended in both for form in (method.descent_form(ascended),)}
    return sorted(forms - {None}, key=repr)


def is_method(kind: Any) -> bool:
    """Whether it is a class of methods that are complete without arguments."""
    from fastsam import methods

    return (
        isinstance(kind, type) and issubclass(kind, methods.Method) and kind not in (methods.Method, methods.Direction)
    )


def largest_forms() -> list[Any]:
    """Of AMP, FriendlySAM, WSAM and LookSAM."""
    from fastsam.spec import PERTURBATION, AscentForm, DescentForm, Row

    first = Row.FIRST_GRAD
    ascents = [AscentForm(y=PERTURBATION), AscentForm(y=Row.METHOD_STATE)]
    return [*ascents, DescentForm(y=first, decoupled=True), DescentForm(y=first, keeps=True)]


def describe(kernel: Any) -> str:
    """What tells a kernel from its siblings."""
    from fastsam.spec import Map, Row, Update

    constants = kernel.constants
    words = []
    if "UPDATE" in constants:
        words.append(Update(constants["UPDATE"]).name)
    if kernel.name == "perturb_kernel" and "coefficients_ptr" in kernel.absent:
        return "by norm"
    if constants.get("ASCENT") is False:
        words.append("of a descent,")
    if "X" in constants:
        words.append(Row(constants["X"]).name)
    if "Y" in constants and constants["Y"] != -1:
        words.append("PERTURBATION" if constants["Y"] == -2 else Row(constants["Y"]).name)
    if constants.get("MAP"):
        words.append(Map(constants["MAP"]).name)
    words += [flag.lower() for flag in ("KEEPS", "DECOUPLED") if constants.get(flag)]
    if kernel.name == "restore_and_update_kernel" and "coefficients_ptr" not in kernel.absent and len(words) == 1:
        words.append("plain form")
    return " ".join(words)


def wide_accesses(kernel: Any) -> int:
    """16-byte accesses of a thread in the paths over whole blocks, in blocks of the table's dtype.

    Each tensor counts once for a read and once for a write, and twice where it is float32 beside a 16-bit parameter.
    Masked stores are not counted.
    """
    constants, kept = kernel.constants, kernel.kind.state_dtype.itemsize // kernel.kind.dtype.itemsize
    size = {name: kept if constants.get(name) != constants["DTYPE"] else 1 for name in ("X_DTYPE", "Y_DTYPE")}
    has_form = "coefficients_ptr" not in kernel.absent
    y = constants.get("Y", -1)
    if kernel.name == "grad_norm_kernel":
        # SAM, ASAM; first for 16-bit gradients, SAM in four blocks at a time and in one.
        return 1 + 2 + (4 + 1 if kernel.kind.dtype.itemsize == 2 else 0)
    if kernel.name == "dots_kernel":
        reads_param = constants["MAP"] == 2 or y == -2
        return size["X_DTYPE"] + reads_param + (kept if y == -2 else size["Y_DTYPE"] if y >= 0 else 0)
    if kernel.name == "perturb_kernel":
        # Read w, x and y; write w; write the backup, or read it (a further ascent, or a master).
        accesses = 1 + size["X_DTYPE"] + (size["Y_DTYPE"] if y >= 0 else 0) + 1 + kept
        # PARAM as y is w itself, read once. By the norm: SAM, ASAM.
        return (accesses - (y == 0)) * (1 if has_form else 2)
    restore = kept + 1
    method = (size["Y_DTYPE"] if y >= 0 else 0) + (1 + 2 * kept if constants["KEEPS"] else 0)
    if constants["UPDATE"] == 0:
        # FIRST_GRAD or METHOD_STATE as y is read once.
        method -= kept if constants["KEEPS"] and y == 9 else constants["KEEPS"] and y == 7
        return restore + (2 + method + constants["DECOUPLED"] if has_form else 0)
    # Read what is updated and the gradient, write w; with masters, read w and write the master.
    plain = kept + 1 + 1 + (1 + kept if kept != 1 or kernel.kind.masters else 0)
    most = constants["MOMENTS"]
    return restore + sum(plain + method + 2 * kept * moments for moments in (most - 1, most))


def most_programs(kernel: Any) -> int | None:
    """How many programs share the chunks; None: each has one."""
    from fastsam.backends.triton_kernels import NORM_PROGRAMS

    return NORM_PROGRAMS if kernel.name == "grad_norm_kernel" else None


def source_of(kernel: Any, target: Any) -> Any:
    """What Triton is to compile: the signature and attributes that a launch has."""
    import torch
    from triton.compiler import ASTSource, make_backend

    from fastsam.backends.triton_kernels import POINTERS

    names = {torch.int64: "*i64", torch.float64: "*fp64", torch.float32: "*fp32", torch.int32: "*i32"}
    constants = dict.fromkeys(kernel.absent) | kernel.constants
    signature = {
        name: "constexpr" if name in constants else names[POINTERS[name]] if name in POINTERS else "i32"
        for name in kernel.function.arg_names
    }
    # On AMD, pointers into small tensors are told from others.
    pointer = make_backend(target).parse_attr("S" if target.backend == "hip" else "")
    attributes = {(i,): pointer for i, name in enumerate(signature) if signature[name].startswith("*")}
    return ASTSource(kernel.function, signature, constants, attributes)


def compile_job(job: Job, out: Path) -> dict[str, Any]:
    """Compiles one specialisation into ``out`` and returns its entry of the report."""
    import triton
    from triton.backends.compiler import GPUTarget

    target_name, dtype, precision, all_forms, number = job
    label, kernel = every_kernel(target_name, dtype, precision, all_forms=all_forms)[number]
    target = GPUTarget(*TARGETS[target_name])
    is_nvidia = target.backend == "cuda"
    begin = time.perf_counter()
    compiled = triton.compile(source_of(kernel, target), target=target, options=kernel.options)
    seconds = time.perf_counter() - begin

    stem = "-".join([*label.split(), *precision.split(), dtype]).replace(".", "_")
    folder = out / f"triton-{triton.__version__}" / target_name
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for suffix in ("ptx", "cubin", "amdgcn", "hsaco"):
        if suffix in compiled.asm:
            content = compiled.asm[suffix]
            files.append(folder / f"{stem}.{suffix}")
            files[-1].write_bytes(content if isinstance(content, bytes) else content.encode())
    registers, spills, lanes, wide = (measure_nvidia if is_nvidia else measure_amd)(files)
    # An assembler that unrolls one loop would hide that another is not wide; PTX has each access once.
    written = len(WIDE_PTX.findall(compiled.asm["ptx"])) if "ptx" in compiled.asm else wide
    threads = kernel.options["num_warps"] * target.warp_size
    programs = resident(target_name, registers, threads)
    return {
        "kernel": label,
        "precision": precision,
        "block": kernel.block,
        "dtype": dtype,
        "target": target_name,
        "triton": triton.__version__,
        "registers": registers,
        "resident": programs,
        "waves": waves(target_name, programs, most_programs(kernel)),
        "spills": spills,
        "lanes": lanes,
        "wide_found": wide,
        "wide_needed": wide_accesses(kernel) * (kernel.block * kernel.kind.dtype.itemsize // (16 * threads)),
        "wide_written": written,
        "file": str(files[-1].relative_to(out)),
        "seconds": round(seconds, 2),
    }


def measure_nvidia(files: list[Path]) -> tuple[int, int, int, int]:
    """Registers, instructions that spill or reload, scalars in lanes, 16-byte accesses: from the machine code."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    (cubin,) = (str(file) for file in files if file.suffix == ".cubin")
    usage = subprocess.run(
        [tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    sass = subprocess.run([tools / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    match = re.search(r"\bREG:(\d+)", usage)
    assert match, usage
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return int(match[1]), spills, 0, len(re.findall(r"\b(?:LDG|STG)\.\S*\b128\b", sass))


def measure_amd(files: list[Path]) -> tuple[int, int, int, int]:
    """The same from amdgcn's text, where the registers are vector registers and spills may be counted in bytes."""
    (text,) = (file.read_text() for file in files if file.suffix == ".amdgcn")
    counts = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+_(?:count|size)):\s+(\d+)", text, re.MULTILINE)}
    wide = re.findall(r"^\s*(?:global|buffer|flat)_(?:load|store)_(?:dwordx4|b128)\b", text, re.MULTILINE)
    spills = counts["vgpr_spill_count"] or counts["private_segment_fixed_size"]
    return counts["vgpr_count"], spills, counts["sgpr_spill_count"], len(wide)


def compile_share(arguments: argparse.Namespace) -> None:
    """Every n-th of the jobs, one line of JSON each."""
    index, count = map(int, arguments.share.split("/"))
    for job in all_jobs(arguments)[index::count]:
        print(json.dumps(compile_job(job, arguments.out)), flush=True)


def all_jobs(arguments: argparse.Namespace) -> list[Job]:
    """What the arguments ask for."""
    targets = arguments.targets or (QUICK["targets"] if arguments.quick else TARGETS)
    dtypes = arguments.dtypes or (QUICK["dtypes"] if arguments.quick else DTYPES)
    # How a result is stored does not depend on the form: beside nearest, the largest will do.
    return [
        (target, dtype, precision, all_forms, number)
        for target in targets
        for dtype in dtypes
        for precision in (PRECISIONS if dtype in ROUNDED_DTYPES else ["nearest"])
        for all_forms in [precision == "nearest" and not arguments.quick]
        for number, (label, _) in enumerate(every_kernel(target, dtype, precision, all_forms=all_forms))
        if re.search(arguments.pattern, f"{label} {precision} {dtype} {target}")
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
    if entry["lanes"] > MOST_LANES:
        found.append("scalars in lanes")
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
    parser.add_argument("-k", dest="pattern", default="", help="a regular expression, as above")
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
    entries.sort(key=lambda e: (e["triton"], e["target"], e["kernel"], e["dtype"], e["precision"]))
    (arguments.out / "report.json").write_text(json.dumps(entries, indent=1) + "\n")
    columns = ("kernel", "precision", "dtype", "target", "triton", "registers", "resident", "waves")
    columns += ("spills", "lanes", "wide_found", "wide_written", "wide_needed")
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
