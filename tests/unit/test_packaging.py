"""Packaging: what setup.py builds for each FASTSAM_BUILD, and what an installed fastsam carries."""

import importlib.metadata
import importlib.resources
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch
from checkout import ROOT
from child import run_python
from internals import native
from setuptools import Distribution

import fastsam
from fastsam.backends import Request
from fastsam.sharpness import hessian


@pytest.fixture
def setup_script(monkeypatch) -> ModuleType:
    """setup.py as a module, in its own folder and with the machine's default compiler."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests run without the checkout, against an installed wheel")
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CXX", "c++")
    return module


def run_build_py(build: dict) -> None:
    command = build["cmdclass"]["build_py"](Distribution())
    command.ensure_finalized()
    command.run()


def test_every_source_is_compiled_and_every_header_is_watched(setup_script):
    (extension,) = setup_script.choose_build("cpu")["ext_modules"]
    found = {suffix: set((ROOT / "csrc").rglob(f"*.{suffix}")) for suffix in ("cpp", "h")}
    for suffix, paths in (("cpp", extension.sources), ("h", extension.depends)):
        others = {path for path in found[suffix] if path.parent.name == "cuda"}
        assert {ROOT / path for path in paths} == found[suffix] - others
    assert "csrc/ops.cpp" in extension.sources


def test_auto_compiles_where_it_can(setup_script):
    assert setup_script.choose_build("auto")["ext_modules"]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"], ids=["absent", "broken"])
def test_auto_without_compiler_is_pure_python_and_says_so_in_one_line(setup_script, monkeypatch, capsys, compiler):
    monkeypatch.setenv("CXX", compiler)
    build = setup_script.choose_build("auto")
    assert "ext_modules" not in build
    run_build_py(build)
    (line,) = capsys.readouterr().err.splitlines()
    assert "slower" in line
    assert compiler in line


def test_obstacle_shows_in_installed_version(setup_script, monkeypatch):
    """pip shows nothing that a build prints, but it shows the version."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert setup_script.choose_build("auto")["options"] == {"egg_info": {"tag_build": "+pure"}}
    assert "options" not in setup_script.choose_build("none")


def test_addresses_are_made_from_one(setup_script, monkeypatch, tmp_path):
    """Another repository in pyproject.toml: every address in the package follows."""
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace(setup_script.repository(), "https://host.test/me/mine"))
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    assert all(url.startswith("https://host.test/me/mine") for url in setup_script.project_urls().values())
    description = setup_script.long_description()
    assert re.search(r"!\[[^]]+\]\(https://host\.test/me/mine/raw/main/docs/demo\.png\)", description)
    assert re.search(r"[^!]\[[^]]+\]\(https://host\.test/me/mine/blob/main/docs/start\.md\)", description)
    assert not re.search(r"\]\((?!https?:|#)", description)


def test_no_other_file_has_the_repositorys_address(setup_script):
    folders = [ROOT, *(ROOT / name for name in (".github", "docs", "fastsam", "examples", "tools"))]
    files = [path for folder in folders for path in (folder.glob("*") if folder == ROOT else folder.rglob("*"))]
    texts = [path for path in files if path.suffix in (".md", ".cff", ".yml", ".yaml", ".toml", ".py", ".sh", ".in")]
    assert [path.name for path in texts if setup_script.repository() in path.read_text()] == ["pyproject.toml"]


def test_optional_packages_are_those_that_errors_name():
    requirements = importlib.metadata.requires("fastsam-optim")
    extra = {re.match(r"[\w-]+", line)[0] for line in requirements if line.endswith('extra == "sharpness"')}
    assert extra == set(hessian.REQUIREMENTS)


@pytest.fixture
def build_backend(setup_script, monkeypatch):
    """tools/build_backend.py, which pip calls."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    return runpy.run_path(str(ROOT / "tools" / "build_backend.py"))


@pytest.mark.parametrize(
    ("build", "has_torch", "needs"),
    [("auto", True, ["ninja"]), ("auto", False, ["ninja", "torch>=2.10"]), ("none", False, [])],
    ids=["compiles", "compiles-without-torch", "pure"],
)
def test_isolated_build_asks_for_what_it_compiles_with(build_backend, monkeypatch, build, has_torch, needs):
    monkeypatch.setenv("FASTSAM_BUILD", build)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: has_torch or None)
    assert build_backend["_needed_to_compile"]() == needs


def test_isolated_build_finds_torch_of_environment(tmp_path):
    """As in pip's isolated environments: the environment's packages are not on the path, its prefix is."""
    if not (ROOT / "tools" / "build_backend.py").exists():
        pytest.skip("the tests run without the checkout, against an installed wheel")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(purelib) / "torch.py").touch()
    # Of the packages here, this one finds setuptools alone.
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (packages / name).symlink_to(Path(setuptools.__file__).parents[1] / name)
    path = f"{packages}:{ROOT / 'tools'}"
    script = f"import sys; sys.path.remove({purelib!r}); import build_backend, torch"
    subprocess.run([python, "-c", script], env={**os.environ, "PYTHONPATH": path}, check=True)


def test_none_compiles_nothing_and_says_nothing(setup_script, capsys):
    build = setup_script.choose_build("none")
    assert "ext_modules" not in build
    run_build_py(build)
    assert capsys.readouterr().err == ""


def test_cpu_without_compiler_fails(setup_script, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"FASTSAM_BUILD=cpu: .*no-such-compiler"):
        setup_script.choose_build("cpu")


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """Puts an nvcc of some version in the place of the machine's; for an empty version, none.

    ``refuses``: what it says to any source.
    """

    def install(version, codes="sm_75 sm_80 sm_90 sm_100", refuses=""):
        monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
        if version:
            cases = f'--version) echo "release {version}, V{version}.1";; --list-gpu-code) echo {codes};;'
            other = f'*) echo "{refuses}" >&2; exit 1;;' if refuses else ""
            (tmp_path / "nvcc").write_text(f"#!/bin/sh\ncase $1 in {cases} {other} esac\n")
            (tmp_path / "nvcc").chmod(0o755)

    return install


def test_cuda_is_library_beside_extension(setup_script, nvcc):
    nvcc("12.8")
    names = [extension.name for extension in setup_script.choose_build("cuda")["ext_modules"]]
    assert names == ["fastsam._C", "fastsam._C_cuda"]


@pytest.mark.parametrize(("version", "reason"), [("", "does not work"), ("11.8", "older than 12.1")])
def test_cuda_without_its_compiler_fails(setup_script, nvcc, version, reason):
    nvcc(version)
    with pytest.raises(SystemExit, match=f"FASTSAM_BUILD=cuda: .*{reason}"):
        setup_script.choose_build("cuda")


def test_sanitize_is_cpus_build_with_sanitizers(setup_script):
    (plain,) = setup_script.choose_build("cpu")["ext_modules"]
    (sanitized,) = setup_script.choose_build("sanitize")["ext_modules"]
    assert sanitized.sources == plain.sources
    added = [flag for flag in sanitized.extra_compile_args if flag not in plain.extra_compile_args]
    assert "-fsanitize=address,undefined" in added
    assert "-fsanitize=address,undefined" in sanitized.extra_link_args


@pytest.mark.parametrize(
    ("torch_has_cuda", "version", "refuses", "said"),
    [
        (True, "12.8", "", ""),
        (True, "", "", "without the compiled CUDA backend, because .*nvcc does not work"),
        (True, "12.8", "unsupported GNU version!", r"CUDA backend.*\+\+ \(unsupported GNU version!"),
        (False, "12.8", "", ""),
    ],
    ids=["both", "no-nvcc", "refused-compiler", "torch-for-the-cpu"],
)
def test_auto_compiles_for_cuda_where_torch_and_compiler_are_for_it(
    setup_script, nvcc, monkeypatch, capsys, torch_has_cuda, version, refuses, said
):
    nvcc(version, refuses=refuses)
    monkeypatch.setattr(setup_script, "torch_has_cuda", lambda: torch_has_cuda)
    names = [extension.name for extension in setup_script.choose_build("auto")["ext_modules"]]
    assert ("fastsam._C_cuda" in names) == (torch_has_cuda and not said)
    assert re.search(said, capsys.readouterr().err)


def test_cuda_with_a_compiler_that_nvcc_refuses_fails(setup_script, nvcc):
    nvcc("12.8", refuses="unsupported GNU version!")
    with pytest.raises(SystemExit, match=r"FASTSAM_BUILD=cuda: .*unsupported GNU version!"):
        setup_script.choose_build("cuda")


@pytest.mark.parametrize(
    ("wanted", "targets"),
    [
        ("", [("80", "sm_80"), ("90", "sm_90"), ("100", "[sm_100,compute_100]")]),
        ("90", [("90", "[sm_90,compute_90]")]),
        ("100;75", [("75", "sm_75"), ("100", "[sm_100,compute_100]")]),
    ],
    ids=["all-that-nvcc-knows", "one", "two"],
)
def test_every_gpu_gets_its_code_and_newest_ptx(setup_script, nvcc, monkeypatch, wanted, targets):
    nvcc("12.8")
    monkeypatch.setenv("FASTSAM_CUDA_ARCHS", wanted)
    flags = setup_script.target_flags(setup_script.find_nvcc()[0])
    assert flags == [f"-gencode=arch=compute_{arch},code={code}" for arch, code in targets]


def test_unknown_gpu_is_error_that_names_it(setup_script, nvcc, monkeypatch):
    nvcc("12.8")
    monkeypatch.setenv("FASTSAM_CUDA_ARCHS", "90;banana")
    with pytest.raises(SystemExit, match=r"FASTSAM_CUDA_ARCHS: .* banana; it knows sm_75"):
        setup_script.target_flags(setup_script.find_nvcc()[0])


@pytest.mark.parametrize("choice", ["banana", "CPU", ""], ids=["unknown", "case", "empty"])
def test_any_other_choice_is_error_that_names_it(setup_script, choice):
    with pytest.raises(SystemExit, match=f"auto, cpu, cuda, sanitize, none, got '{choice}'"):
        setup_script.choose_build(choice)


def test_installed_package_is_complete():
    assert importlib.metadata.version("fastsam-optim") == fastsam.__version__
    assert (importlib.resources.files("fastsam") / "py.typed").is_file()
    assert importlib.util.find_spec("fastsam.kernels") is not None


def test_extension_needs_stable_abi_alone():
    spec = importlib.util.find_spec("fastsam._C")
    if spec is None:
        pytest.skip("fastsam was built pure Python")
    binary = Path(spec.origin)
    assert binary.name == "_C.abi3.so"
    content = binary.read_bytes()
    assert b"libtorch_cpu.so" in content
    for library in (b"libtorch_python.so", b"libc10.so", b"libtorch.so", b"libpython"):
        assert library not in content
    assert str(Path.home()).encode() not in content
    assert str(ROOT).encode() not in content


def test_extension_runs_with_libraries_of_manylinux_2_28():
    """What is newer has a definition in csrc/portable.cpp."""
    spec = importlib.util.find_spec("fastsam._C")
    if spec is None:
        pytest.skip("fastsam was built pure Python")
    content = Path(spec.origin).read_bytes()
    for name, newest in ((b"GLIBC_2", 28), (rb"GLIBCXX_3\.4", 24), (rb"CXXABI_1\.3", 11)):
        needed = [int(version) for version in re.findall(name + rb"\.(\d+)\b", content)]
        assert max(needed, default=0) <= newest, (name, sorted(set(needed)))


@pytest.fixture
def cuda_library():
    if not native.cuda_library().exists():
        pytest.skip("fastsam was built without CUDA: make cuda")
    return native.cuda_library()


def test_cuda_library_needs_no_cuda_to_load(cuda_library):
    """Beside a PyTorch without CUDA it registers its kernels, and those of the CPU run."""
    script = f"""
import torch, fastsam
torch.ops.load_library({str(cuda_library)!r})
assert torch._C._dispatch_has_kernel_for_dispatch_key("fastsam::perturb_", "CUDA")
weight = torch.nn.Parameter(torch.ones(3))
optimizer = fastsam.FastSAM([weight], lr=0.1, backend="native")
weight.square().sum().backward()
optimizer.first_step()
weight.square().sum().backward()
optimizer.second_step()
assert (weight < 1).all(), weight
"""
    done = run_python(script)
    assert done.returncode == 0, done.stdout


def test_cuda_library_has_its_own_runtime(cuda_library):
    content = cuda_library.read_bytes()
    assert b"libtorch_cpu.so" in content
    for library in (b"libcudart.so", b"libtorch_python.so", b"libc10.so", b"libpython"):
        assert library not in content


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_without_cuda_native_backend_says_so():
    assert "was built without CUDA" in native.unsupported_reason(Request("cuda"))
