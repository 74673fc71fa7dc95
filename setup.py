"""Compiles csrc/ into fastsam/_C.abi3.so.

The environment variable FASTSAM_BUILD says what is compiled:

    auto  for the CPU if torch can be imported and a C++ compiler works, else nothing: pure Python (the default)
    cpu   for the CPU, or fail
    cuda  for the CPU and for CUDA, or fail
    sanitize  for the CPU, with AddressSanitizer and UBSan, or fail (make sanitize)
    none  nothing: pure Python

The compiler needs torch's headers, so: pip install --no-build-isolation --no-deps .
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages
from setuptools.command.build_py import build_py

CHOICES = ("auto", "cpu", "cuda", "sanitize", "none")
CSRC = Path("csrc")  # relative, as setuptools wants sources; a build runs in this file's folder

CPP_STANDARD = "-std=c++20"  # what the headers of torch 2.13 are written in
COMPILE_ARGS = [
    CPP_STANDARD,
    "-O3",
    "-g0",  # Python adds -g, and nine tenths of the file would be for a debugger
    "-fno-math-errno",  # errno would keep sqrt, and with it Adam's loop, scalar
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # PyTorch's stable ABI of 2.10 and Python's of 3.10: one binary for these and all later ones.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPy_LIMITED_API=0x030A0000",
]
# After the others: reports name lines, and undefined behaviour, signed overflow too, ends the program.
SANITIZERS = "-fsanitize=address,undefined"
SANITIZE_ARGS = [SANITIZERS, "-fno-sanitize-recover=all", "-fno-wrapv", "-fno-omit-frame-pointer", "-O1", "-g"]


def first_line(text: object) -> str:
    """Returns the first line of a message."""
    return str(text).partition("\n")[0]


def find_obstacle() -> str | None:
    """Returns why nothing can be compiled here, in one line, or None."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported ({first_line(error)}): --no-build-isolation --no-deps lets the build see it"
    if torch.__version__ < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    # setuptools and torch each have a default of their own: name one compiler for both.
    compiler = os.environ.setdefault("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        flags = [CPP_STANDARD, "-shared", "-fPIC", "-I", sysconfig.get_path("include"), "-x", "c++", "-"]
        command = [*shlex.split(compiler), *flags, "-o", f"{folder}/probe.so"]
        try:
            subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, check=True)
        except OSError as error:
            return f"no C++ compiler ({error})"
        except subprocess.CalledProcessError as error:
            reason = first_line(error.stderr) or f"exit status {error.returncode}"
            return f"the C++ compiler {compiler} does not work ({reason})"
    return None


def cpu_build(sanitize: bool = False) -> dict:
    """Returns what compiles ``fastsam._C`` from csrc/*.cpp and csrc/cpu/*.cpp, as keywords of ``setup``."""
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    extension = Extension(
        "fastsam._C",
        sources=[str(path) for folder in (CSRC, CSRC / "cpu") for path in sorted(folder.glob("*.cpp"))],
        depends=[str(path) for path in sorted(CSRC.rglob("*.h"))],
        # -isystem: warnings are for this project's code.
        extra_compile_args=[
            *COMPILE_ARGS,
            *(SANITIZE_ARGS if sanitize else []),
            *(f"-isystem{path}" for path in include_paths()),
        ],
        extra_link_args=[SANITIZERS] if sanitize else [],
        # The stable ABI is all in libtorch_cpu; CppExtension's other libraries would be needed at run time for nothing.
        libraries=["torch_cpu"],
        library_dirs=library_paths(),
        language="c++",
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def cuda_build() -> dict:
    """Returns what also compiles csrc/cuda/*.cu. CUDAExtension refuses a CPU build of torch: nvcc is to be run here."""
    raise SystemExit("FASTSAM_BUILD=cuda: this version has no CUDA sources; use FASTSAM_BUILD=cpu")


def pure_build(obstacle: str | None) -> dict:
    """Returns a build that compiles nothing and, where that was not asked for, says so when it runs."""

    class BuildPurePython(build_py):
        def run(self) -> None:
            if obstacle:
                cost = "pure Python, without the compiled CPU backend: steps on the CPU will be slower"
                print(f"fastsam: {cost}, because {obstacle}", file=sys.stderr)
            super().run()

    return {"cmdclass": {"build_py": BuildPurePython}}


def choose_build(choice: str) -> dict:
    """Returns the keywords of ``setup`` for one value of FASTSAM_BUILD."""
    if choice not in CHOICES:
        raise SystemExit(f"FASTSAM_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "none":
        return pure_build(obstacle=None)
    obstacle = find_obstacle()
    if obstacle and choice == "auto":
        return pure_build(obstacle)
    if obstacle:
        raise SystemExit(f"FASTSAM_BUILD={choice}: {obstacle}")
    return cuda_build() if choice == "cuda" else cpu_build(sanitize=choice == "sanitize")


if __name__ == "__main__":
    # Without isolation nobody checks what pyproject.toml requires, and an older one's own complaint misleads.
    if int(setuptools.__version__.partition(".")[0]) < 77:
        raise SystemExit(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'")
    setuptools.setup(
        packages=[*find_packages(include=["fastsam", "fastsam.*"]), "fastsam.kernels"],
        # The folder has no place under fastsam/, and the top-level name `kernels` belongs to another project.
        package_dir={"fastsam.kernels": "kernels"},
        **choose_build(os.environ.get("FASTSAM_BUILD", "auto")),
    )
