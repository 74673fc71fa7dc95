"""Compiles csrc/cuda/ for the CPU, once for each state of the sources, and loads it."""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-DFASTSAM_CUDA_THREADS=4", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def build() -> Path:
    """The library."""
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    everything = [path for folder in (ROOT / "csrc", HERE) for path in sorted(folder.rglob("*")) if path.is_file()]
    content = b"".join(path.read_bytes() for path in everything if path.suffix != ".pyc")
    digest = hashlib.sha256(content + f"{torch.__version__} {FLAGS}".encode()).hexdigest()[:16]
    folder = ROOT / "build" / "cuda_on_cpu" / digest
    library = folder / "libfastsam_on_cpu.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    headers = [f"-I{HERE}", *(f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include")))]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run([*compiler, *FLAGS, *headers, "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*kernels, HERE / "ops.cpp"]))
    unfinished = folder / f"{os.getpid()}.so"
    torch_library = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    subprocess.run([*compiler, "-shared", "-pthread", *objects, *torch_library, "-o", str(unfinished)], check=True)
    unfinished.rename(library)
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Plain functions by ctypes, operators in ``torch.ops.fastsam_on_cpu``."""
    if not (ROOT / "csrc").exists():
        pytest.skip("the tests run without the checkout, against an installed wheel")
    functions = ctypes.CDLL(str(build()))
    for name in ("plan", "few_tensors", "many_tensors", "method_tensors", "launches", "loads"):
        getattr(functions, name).restype = ctypes.c_int64
    functions.power.restype = ctypes.c_double
    functions.fastsam_cuda_load_update.restype = ctypes.c_char_p
    return functions
