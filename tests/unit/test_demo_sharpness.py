"""``python -m fastsam sharpness``: its rows, its table, its picture; training and measuring are tested elsewhere."""

import dataclasses
import importlib.util

import pytest
import torch

from fastsam import __main__ as command_line
from fastsam import sharpness
from fastsam.demo import methods
from fastsam.demo.sharpness import measure
from fastsam.demo.sharpness.options import SharpnessOptions
from fastsam.demo.sharpness.rows import PERTURBATIONS, rows

for package in ("hessian_eigenthings", "matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

from fastsam.demo.sharpness import command  # noqa: E402
from fastsam.demo.sharpness.report import measurements_table, verdict  # noqa: E402


def measured(scale=1.0):
    density = sharpness.SpectralDensity(
        torch.linspace(-1, 1, 5), torch.rand(5), torch.zeros(1, 2), torch.ones(1, 2) / 2, 0.1
    )
    line = [1.0] * len(measure.RADII)
    values = [scale * x for x in (8.0, 4.0, 3.0, 2.5, 2.0)]
    return measure.Measured(90.0, 0.5, values, 30.0, 0.1, 0.2, 0.001, [1, 2], [1.0, 8.0], line, density)


def test_table_and_verdict():
    results = {"SGD": [measured(2), measured(4)], "FastSAM": [measured(), measured()]}
    lines = measurements_table(results, SharpnessOptions(seeds=2)).splitlines()
    assert lines[-2].split()[:4] == ["SGD", "90", "+-", "0"]
    assert "24 +- 11" in lines[-2]
    assert "batch norm with its running statistics" in lines[1] + lines[0]
    assert max(map(len, lines)) < 160
    text = verdict(results)
    assert "lower with FastSAM than with SGD in 2 of 2 seeds, by factors of 2.0, 4.0" in text
    assert "lambda_max / lambda_5 is 4.0 with SGD and 4.0 with FastSAM" in text
    assert "11.4" in text
    plain = measurements_table({"SGD": [measured()]}, SharpnessOptions(seeds=1, batch_norm=False))
    assert "a network without batch norm" in plain
    assert "+-" not in plain.splitlines()[-1]


def test_command_draws_and_prints(monkeypatch, tmp_path, capsys):
    options = []

    def measure_all(given):
        options.append(given)
        return {method.name: [measured()] for method in rows(given)}

    monkeypatch.setattr(command, "measure_all", measure_all)
    picture = tmp_path / "sharp.png"
    arguments = ["--m", "--seeds", "1", "--radius", "0.2", "--no-batch-norm", "--output", str(picture)]
    assert command_line.main(["sharpness", *arguments]) == 0
    printed = capsys.readouterr().out
    assert all(method.name in printed for method in PERTURBATIONS)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (options[0].m, options[0].radius, options[0].batch_norm) == (True, 0.2, False)


def test_rows():
    assert rows(SharpnessOptions()) == methods.METHODS
    assert rows(SharpnessOptions(m=True)) == PERTURBATIONS
    assert [method.parts_of for method in PERTURBATIONS] == [None, None, None, None, 4, 1]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["FastSAM", "SAM, m = 4", "n-SAM (all images)"])
def test_run_is_measured(name):
    options = SharpnessOptions(seeds=1, epochs=1, batch_size=300, m=name != "FastSAM")
    passes = []
    found = measure.measure_run(name, 0, options, passes.append)
    assert sum(passes) == pytest.approx(measure.total_passes(name, 0, options))
    assert found.eigenvalues == sorted(found.eigenvalues, reverse=True)
    assert found.worst >= found.ascent > 0
    assert found.loss == pytest.approx(found.line[measure.RADII.index(0.0)], rel=1e-5)
    assert len(found.epochs) == len(found.rises)
    assert found.density is not None


def test_missing_packages_are_named(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "hessian_eigenthings" else find_spec(name)
    )
    assert command.run(SharpnessOptions()) == 1
    assert capsys.readouterr().err == "this also needs: pip install hessian-eigenthings\n"


def test_options_extend_the_demos():
    fields = {field.name for field in dataclasses.fields(SharpnessOptions)}
    assert {"rho", "noise", "mixup", "swa", "radius", "m", "processes"} <= fields
    with pytest.raises(SystemExit):
        command_line.main(["sharpness", "--sweep"])
