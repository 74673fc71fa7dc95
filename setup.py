"""Compiles csrc/ into fastsam/_C.abi3.so, and csrc/cuda/ into fastsam/_C_cuda.abi3.so.

The environment variable FASTSAM_BUILD selects what is compiled:

    auto  (the default) for the CPU if torch can be imported and a C++ compiler works, else nothing (pure Python); also
          for CUDA if torch is a CUDA build and there is an nvcc
    cpu   for the CPU, or fail
    cuda  for the CPU and for CUDA, or fail; torch may be a CPU build
    sanitize  for the CPU, with AddressSanitizer and UBSan, or fail (make sanitize)
    none  nothing: pure Python

FASTSAM_CUDA_ARCHS, if set, selects the GPU architectures: "90", or "80;90". CUDACXX, if set, is the nvcc to use.

The compiler needs torch's headers. pip's isolated builds find torch by tools/build_backend.py; without isolation:
pip install --no-build-isolation --no-deps .
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages
from setuptools.command.build_py import build_py

CHOICES = ("auto", "cpu", "cuda", "sanitize", "none")
CSRC = Path("csrc")  # relative, as setuptools requires for sources; a build runs in this file's folder

CPP_STANDARD = "-std=c++20"  # required by the headers of torch 2.13
COMPILE_ARGS = [
    CPP_STANDARD,
    "-O3",
    "-g0",  # Python adds -g, and debug information would be nine tenths of the file
    "-fno-math-errno",  # errno would prevent vectorising sqrt, and so Adam's loop
    # GCC moves conditions such as `adaptive` out of a loop only if it is small, and needs that to vectorise for AVX2.
    "--param=max-unswitch-insns=1000",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # PyTorch's stable ABI of 2.10 and Python's of 3.10: one binary for these and all later versions.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPy_LIMITED_API=0x030A0000",
]
# -s: no symbol table, which nothing needs at run time and which is a third of the file.
LINK_ARGS = ["-Wl,-s"]
# These follow the others: reports contain line numbers, and undefined behaviour (also signed overflow) is fatal.
SANITIZERS = "-fsanitize=address,undefined"
SANITIZE_ARGS = [SANITIZERS, "-fno-sanitize-recover=all", "-fno-wrapv", "-fno-omit-frame-pointer", "-O1", "-g"]

CUDA_LIBRARY = "fastsam._C_cuda"
CUDA_ARCHS = ("80", "90", "100", "120")
OLDEST_NVCC = (12, 1)  # allows 32,764 bytes of kernel arguments; tried: 13.0


def first_line(text: object) -> str:
    """Returns the first line of a message."""
    return str(text).partition("\n")[0]


def find_obstacle() -> str | None:
    """Returns one line that says why nothing can be compiled here, or None."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported ({first_line(error)}): --no-build-isolation --no-deps lets the build see it"
    if torch.__version__ < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    # setuptools and torch have different defaults: this sets one compiler for both.
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


def without_folders(headers: list[str]) -> list[str]:
    """Returns the flags that keep this machine's folders out of the binary: it does not depend on where it is built."""
    folders = {str(Path.cwd()): ".", **dict.fromkeys(headers, "torch")}
    return [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]


def cpu_build(sanitize: bool = False) -> dict:
    """Returns the keywords of ``setup`` that compile ``fastsam._C`` from csrc/*.cpp and csrc/cpu/*.cpp."""
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    extension = Extension(
        "fastsam._C",
        sources=[str(path) for folder in (CSRC, CSRC / "cpu") for path in sorted(folder.glob("*.cpp"))],
        depends=[str(path) for folder in (CSRC, CSRC / "cpu") for path in sorted(folder.glob("*.h"))],
        # -isystem: warn about this project's code only.
        extra_compile_args=[
            *COMPILE_ARGS,
            *([] if sanitize else without_folders(include_paths())),
            *(SANITIZE_ARGS if sanitize else []),
            *(f"-isystem{path}" for path in include_paths()),
        ],
        extra_link_args=[SANITIZERS] if sanitize else LINK_ARGS,
        # libtorch_cpu has the whole stable ABI; CppExtension would also link libraries that are not needed.
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


@functools.cache
def find_nvcc() -> tuple[str, str]:
    """Returns the nvcc to use, and one line that says why there is none: one of the two is empty."""
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{cuda_home}/bin")
    if nvcc is None:
        return "", "no nvcc was found: set CUDACXX or CUDA_HOME"
    try:
        found = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return "", f"{nvcc} does not work ({first_line(error)})"
    release = re.search(r"release (\d+)\.(\d+)", found)
    if release is None or tuple(map(int, release.groups())) < OLDEST_NVCC:
        return "", f"{nvcc} is older than {'.'.join(map(str, OLDEST_NVCC))}"
    # Each nvcc takes C++ compilers up to some version.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text("#include <vector>\n__global__ void probe(std::vector<int>*) {}\n")
        command = [*with_compiler(nvcc), CPP_STANDARD, "-c", str(source), "-o", f"{folder}/probe.o"]
        probe = subprocess.run(command, capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        reason = first_line((probe.stderr or probe.stdout).strip()) or f"exit status {probe.returncode}"
        return "", f"{nvcc} does not compile with {os.environ['CXX']} ({reason})"
    return nvcc, ""


def with_compiler(nvcc: str) -> list[str]:
    """Returns nvcc, told which C++ compiler to use."""
    return [nvcc, f"-ccbin={shlex.split(os.environ['CXX'])[-1]}"]


def target_flags(nvcc: str) -> list[str]:
    """Returns nvcc's target flags: machine code for each architecture, and PTX for later ones."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    wanted = os.environ.get("FASTSAM_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
    if unknown := [arch for arch in wanted if f"sm_{arch}" not in known]:
        raise SystemExit(f"FASTSAM_CUDA_ARCHS: {nvcc} does not know {', '.join(unknown)}; it knows {' '.join(known)}")
    archs = sorted(
        wanted or [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known], key=lambda arch: int(arch.rstrip("af"))
    )
    codes = [f"sm_{arch}" for arch in archs]
    codes[-1] = f"[{codes[-1]},compute_{archs[-1]}]"
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in zip(archs, codes, strict=True)]


def compile_cuda(folder: Path, library: Path) -> None:
    """Compiles csrc/cuda/ into a library of its own, with CUDA's runtime linked statically.

    It calls nvcc itself, because CUDAExtension refuses a CPU build of torch.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    nvcc, _ = find_nvcc()
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    command = [*with_compiler(nvcc), CPP_STANDARD, "-O3", "--threads=2", *target_flags(nvcc)]
    command += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-isystem={path}" for path in include_paths()]
    # nvcc contracts multiplications and additions to FMAs in some kernels and not in others; without contraction,
    # training with float32 master weights has the same bits as training float32 parameters.
    command += ["-fmad=false"]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run([*command, "-c", str(source), "-o", target], check=True)
        return target

    sources = [path for path in sorted((CSRC / "cuda").iterdir()) if path.suffix in (".cu", ".cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    # libtorch brings libtorch_cuda where there is one. The runtime's symbols stay inside: torch has a runtime, too,
    # maybe another one.
    link = ["-shared", "-cudart=static", "-Xlinker=--no-as-needed", "-Xlinker=--exclude-libs,ALL"]
    link += [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu"]
    subprocess.run([*with_compiler(nvcc), *link, *objects, "-o", str(library)], check=True)


def cuda_build() -> dict:
    """Returns the keywords of ``setup`` that also compile csrc/cuda/, into a library named and placed like a module."""
    build = cpu_build()

    class BuildWithCuda(build["cmdclass"]["build_ext"]):
        def build_extension(self, extension: Extension) -> None:
            if extension.name == CUDA_LIBRARY:
                compile_cuda(Path(self.build_temp) / "cuda", Path(self.get_ext_fullpath(extension.name)))
            else:
                super().build_extension(extension)

    library = Extension(CUDA_LIBRARY, sources=[], py_limited_api=True)  # setuptools does not compile its sources
    return build | {"ext_modules": [*build["ext_modules"], library], "cmdclass": {"build_ext": BuildWithCuda}}


def torch_has_cuda() -> bool:
    """Returns whether torch is a build for CUDA."""
    import torch

    return torch.version.cuda is not None


def pure_build(obstacle: str | None) -> dict:
    """Returns a build that compiles nothing.

    If an obstacle is the reason, it prints it when it runs, and the version ends in "+pure": pip does not show what a
    build prints, but the version that it has installed.
    """

    class BuildPurePython(build_py):
        def run(self) -> None:
            if obstacle:
                cost = "pure Python, without the compiled CPU backend: steps on the CPU will be slower"
                print(f"fastsam: {cost}, because {obstacle}", file=sys.stderr)
            super().run()

    label = {"options": {"egg_info": {"tag_build": "+pure"}}} if obstacle else {}
    return {"cmdclass": {"build_py": BuildPurePython}} | label


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
    _, cuda_obstacle = find_nvcc() if choice in ("auto", "cuda") else ("", "")
    if choice == "cuda" and cuda_obstacle:
        raise SystemExit(f"FASTSAM_BUILD=cuda: {cuda_obstacle}")
    wants_cuda = choice == "cuda" or (choice == "auto" and torch_has_cuda())
    if wants_cuda and cuda_obstacle:
        print(f"fastsam: without the compiled CUDA backend, because {cuda_obstacle}", file=sys.stderr)
    return cuda_build() if wants_cuda and not cuda_obstacle else cpu_build(sanitize=choice == "sanitize")


def repository() -> str:
    """Returns the repository's address."""
    return re.search(r'^repository = "(.+)"', Path("pyproject.toml").read_text(), re.MULTILINE)[1]


def project_urls() -> dict[str, str]:
    """Returns the addresses that the package's metadata has."""
    url = repository()
    return {
        "Source": url,
        "Documentation": f"{url}/blob/main/docs/index.md",
        "Changelog": f"{url}/blob/main/CHANGELOG.md",
        "Issues": f"{url}/issues",
    }


def long_description() -> str:
    """Returns README.md with absolute links, for pages that are not the repository's."""
    url = repository()
    absolute = re.sub(r"!\[([^]]*)\]\((?!\w+:)", rf"![\1]({url}/raw/main/", Path("README.md").read_text())
    return re.sub(r"\]\((?!\w+:|#)", f"]({url}/blob/main/", absolute)


if __name__ == "__main__":
    # Without isolation pip does not check pyproject.toml's requirements, and older versions give a misleading error.
    if int(setuptools.__version__.partition(".")[0]) < 77:
        raise SystemExit(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'")
    setuptools.setup(
        packages=[*find_packages(include=["fastsam", "fastsam.*"]), "fastsam.kernels"],
        # The folder is not under fastsam/, and the top-level name `kernels` belongs to another project.
        package_dir={"fastsam.kernels": "kernels"},
        project_urls=project_urls(),
        long_description=long_description(),
        long_description_content_type="text/markdown",
        **choose_build(os.environ.get("FASTSAM_BUILD", "auto")),
    )
