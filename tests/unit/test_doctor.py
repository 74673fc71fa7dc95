"""``python -m fastsam doctor``: it finds what is wrong, says what cannot run, and is content with what is right."""

import importlib.util
import json
import logging

import pytest
import torch
from internals import MODULES, UPDATE_OPERATIONS, BackendUnavailable, foreach, load, reference, resolve, table_params

from fastsam import __main__ as command_line
from fastsam import doctor
from fastsam.doctor import self_check

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """One dtype, but for thorough tests; one thread: on a busy machine several take a hundred times as long."""
    if "thorough" not in request.keywords:
        monkeypatch.setattr(self_check, "DTYPES", (torch.float64,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_triton(monkeypatch):
    """Its interpreter would take most of the time."""

    monkeypatch.setattr(MODULES["triton"], "unsupported_reason", lambda request: "left out")


def add_noise(size):
    """A decorator for ``perturb_``: one element of the perturbation is off by ``size`` of itself."""

    def decorate(perturb_):
        def wrong(table, *arguments):
            perturb_(table, *arguments)
            param = next(p for p in table_params(table) if p.numel() > 100)
            param.data.view(-1)[-1] *= 1 + size

        return wrong

    return decorate


def can_run(name, device_type):
    try:
        load(name, device_type)
    except BackendUnavailable:
        return False
    return True


@pytest.mark.parametrize("dtypes", ["float64", pytest.param("all", marks=pytest.mark.thorough)])
def test_every_backend_that_can_run_is_right(backend, device, dtypes):
    outcome = self_check.check_backend(backend, device)
    assert outcome.ok, outcome
    assert outcome.steps == len(self_check.DTYPES) * len(self_check.BASES) * 2 * self_check.STEPS


def test_content_report(capsys):
    assert command_line.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:3] for line in printed.splitlines() if line.startswith("  ")}
    assert rows["reference"] == rows["foreach"] == ["cpu", "ok"]
    assert {"reference", "foreach", "native", "triton", "fastsam", "python", "torch"} <= set(rows)
    assert rows["triton"][1] == ("ok" if can_run("triton", "cpu") else "unavailable")
    assert torch.__version__ in printed
    assert "all is well" in printed
    assert all(len(line) <= doctor.WIDTH or len(line.split()) == 1 for line in printed.splitlines())


def test_a_long_path_stays_whole(capsys):
    path = "/a-path/" + "of-many-parts/" * 10
    doctor._section("extension", [("file", f"_C.abi3.so, in {path}")])
    assert path in capsys.readouterr().out.split()


def test_json_has_what_the_text_has(capsys, without_triton):
    assert command_line.main(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert command_line.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["auto"] == {"cpu": resolve("auto", "cpu").__name__.rpartition(".")[2]}
    rows = [*report["versions"].items(), *report["devices"].items(), *report["extension"].items()]
    rows += [(row["name"], row["device"], row["verdict"], row["detail"]) for row in report["backends"]]
    assert all(" ".join(row) in text for row in rows)


def test_json_of_wrong_backend(monkeypatch, capsys, without_triton):
    monkeypatch.setattr(foreach, "perturb_", add_noise(0.1)(foreach.perturb_))
    assert command_line.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert [row["name"] for row in report["backends"] if row["verdict"] == "wrong"] == ["foreach"]


def test_auto_is_what_resolve_picks(capsys, without_triton):
    command_line.main(["doctor"])
    picked = resolve("auto", "cpu").__name__.rpartition(".")[2]
    assert f"cpu          picks {picked}\n" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1e-13, 0.1, float("nan")], ids=["a-few-ulp", "large", "nan"])
def test_wrong_perturbation_is_found_and_named(size, monkeypatch, capsys, without_triton):
    monkeypatch.setattr(foreach, "perturb_", add_noise(size)(foreach.perturb_))
    assert command_line.main(["doctor"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "foreach cpu wrong" in printed
    assert "reference cpu ok" in printed
    assert ", tensor 4 of shape (127,)" in printed
    assert "WRONG: foreach on cpu" in printed


def test_wrong_reference_is_found(monkeypatch):
    monkeypatch.setattr(reference, "perturb_", add_noise(1e-13)(reference.perturb_))
    assert not self_check.check_backend("reference", CPU).ok


def test_restore_that_is_not_exact_is_found(monkeypatch):
    def restore_(table):
        correct(table)
        table_params(table)[0].data.mul_(1 + 2.3e-16)

    correct = foreach.restore_
    monkeypatch.setattr(foreach, "restore_", restore_)
    outcome = self_check.check_backend("foreach", CPU)
    assert outcome.error == float("inf")
    assert "restore" in outcome.where


@pytest.mark.parametrize("operation", UPDATE_OPERATIONS)
def test_update_that_does_nothing_is_found(operation, monkeypatch):
    monkeypatch.setattr(foreach, operation, lambda table, *_: foreach.restore_(table))
    assert not self_check.check_backend("foreach", CPU).ok


def test_perturbation_by_nan_is_found(monkeypatch):
    def perturb_(table, ascent):
        correct(table, ascent._replace(norm=torch.where(ascent.norm.isfinite(), ascent.norm, 1.0)))

    correct = foreach.perturb_
    monkeypatch.setattr(foreach, "perturb_", perturb_)
    outcome = self_check.check_backend("foreach", CPU)
    assert outcome.error == float("inf")
    assert f"step {self_check.NAN_STEP}, " in outcome.where


def test_backend_that_raises_is_wrong(monkeypatch, capsys, without_triton):
    def perturb_(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(foreach, "perturb_", perturb_)
    assert command_line.main(["doctor"]) == 1
    assert "raised RuntimeError: no such kernel" in capsys.readouterr().out


def test_unavailable_backend_gives_its_reason_and_is_no_error(monkeypatch, capsys, without_triton):
    monkeypatch.setattr(foreach, "unsupported_reason", lambda request: "needs a full moon")
    assert command_line.main(["doctor"]) == 0
    assert "unavailable  needs a full moon" in capsys.readouterr().out


def test_missing_extension_says_what_it_costs(monkeypatch, capsys, without_triton):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastsam._C" else find_spec(name))
    command_line.main(["doctor"])
    printed = capsys.readouterr().out
    assert "several times slower" in printed
    assert "pip install --no-build-isolation --no-deps" in printed


def test_logger_is_as_before(without_triton):
    logger = logging.getLogger("fastsam")
    before = logger.disabled, logger.level, list(logger.handlers)
    doctor.run()
    assert (logger.disabled, logger.level, list(logger.handlers)) == before
