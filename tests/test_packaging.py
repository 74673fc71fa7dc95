"""Packaging: what setup.py builds for each FASTSAM_BUILD, and what an installed fastsam carries."""

import importlib.metadata
import importlib.resources
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution

import fastsam

ROOT = Path(__file__).parents[1]


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
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
    assert set(extension.sources) == expected
    assert "csrc/ops.cpp" in expected
    assert set(extension.depends) == {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")}


def test_auto_compiles_where_it_can(setup_script):
    assert setup_script.choose_build("auto")["ext_modules"]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"], ids=["absent", "broken"])
def test_auto_without_a_compiler_is_pure_python_and_says_so_in_one_line(setup_script, monkeypatch, capsys, compiler):
    monkeypatch.setenv("CXX", compiler)
    build = setup_script.choose_build("auto")
    assert "ext_modules" not in build
    run_build_py(build)
    (line,) = capsys.readouterr().err.splitlines()
    assert "slower" in line
    assert compiler in line


def test_none_compiles_nothing_and_says_nothing(setup_script, capsys):
    build = setup_script.choose_build("none")
    assert "ext_modules" not in build
    run_build_py(build)
    assert capsys.readouterr().err == ""


def test_cpu_without_a_compiler_fails(setup_script, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"FASTSAM_BUILD=cpu: .*no-such-compiler"):
        setup_script.choose_build("cpu")


def test_sanitize_is_the_cpus_build_with_sanitizers(setup_script):
    (plain,) = setup_script.choose_build("cpu")["ext_modules"]
    (sanitized,) = setup_script.choose_build("sanitize")["ext_modules"]
    assert sanitized.sources == plain.sources
    added = [flag for flag in sanitized.extra_compile_args if flag not in plain.extra_compile_args]
    assert "-fsanitize=address,undefined" in added
    assert "-fsanitize=address,undefined" in sanitized.extra_link_args


def test_cuda_is_refused(setup_script):
    with pytest.raises(SystemExit, match="no CUDA sources"):
        setup_script.choose_build("cuda")


@pytest.mark.parametrize("choice", ["banana", "CPU", ""], ids=["unknown", "case", "empty"])
def test_any_other_choice_is_an_error_that_names_it(setup_script, choice):
    with pytest.raises(SystemExit, match=f"auto, cpu, cuda, sanitize, none, got '{choice}'"):
        setup_script.choose_build(choice)


def test_installed_package_is_complete():
    assert importlib.metadata.version("fastsam-optim") == fastsam.__version__
    assert (importlib.resources.files("fastsam") / "py.typed").is_file()
    assert importlib.util.find_spec("fastsam.kernels") is not None


def test_extension_needs_the_stable_abi_alone():
    spec = importlib.util.find_spec("fastsam._C")
    if spec is None:
        pytest.skip("fastsam was built pure Python")
    binary = Path(spec.origin)
    assert binary.name == "_C.abi3.so"
    content = binary.read_bytes()
    assert b"libtorch_cpu.so" in content
    for library in (b"libtorch_python.so", b"libc10.so", b"libtorch.so", b"libpython"):
        assert library not in content
