"""Sharpness while training: what is recorded, when, and where it goes."""

import csv

import pytest
import torch
from problem import Problem
from torch.nn import functional as F

from fastsam import FastSAM, sharpness


@pytest.fixture
def problem():
    return Problem("cpu")


def data_of(problem):
    return problem.model, F.mse_loss, [(problem.x, problem.y)]


def test_ascent_is_last_ascent(problem):
    optimizer = problem.optimizer("auto", rho=0.1)
    records = []
    with sharpness.Monitor(optimizer, every=2, log=records.append) as monitor:
        expected = []
        for _ in range(5):
            problem.step(optimizer)
            expected.append(optimizer.last_ascent)
    problem.step(optimizer)
    problem.step(optimizer)
    assert monitor.history == records
    assert [record["step"] for record in records] == [2, 4]
    for record, last in zip(records, (expected[1], expected[3]), strict=True):
        assert record["loss"] == last.loss.item()
        assert record["perturbed_loss"] == last.perturbed_loss.item()
        assert record["ascent"] == last.sharpness.item() > 0
        assert record["grad_norm"] == last.grad_norm.item()


def test_every_measure(problem, tmp_path):
    optimizer = problem.optimizer("auto", rho=0.1)
    arguments = data_of(problem)
    file = tmp_path / "sharpness.csv"
    monitor = sharpness.Monitor(
        optimizer, *arguments, every=1, measures=("worst", "ascent", "average", "lambda_max", "trace"), log=file,
        settings={"worst": {"steps": 3}, "average": {"samples": 5, "rho": 0.2}, "trace": {"samples": 9}},
    )  # fmt: skip
    before = Problem("cpu")
    plain = before.optimizer("auto", rho=0.1)
    for _ in range(2):
        problem.step(optimizer)
        before.step(plain)
    assert all(torch.equal(a, b) for a, b in zip(problem.params, before.params, strict=True)), "training is the same"
    record = monitor.history[-1]
    assert record["worst"] == sharpness.worst(*arguments, 0.1, steps=3).value
    assert record["average"] == sharpness.average(*arguments, 0.2, samples=5).value
    assert record["lambda_max"] == sharpness.hessian_eigenvalues(*arguments, 1).values.item()
    assert record["trace"] == sharpness.hessian_trace(*arguments, samples=9).value
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2
    assert {name: float(value) for name, value in rows[1].items()} == record


def test_steps_without_an_ascent_leave_their_columns_empty(problem, tmp_path):
    optimizer = problem.optimizer("auto", rho=0.1, interval=2)
    file = tmp_path / "sharpness.csv"
    with sharpness.Monitor(optimizer, every=1, log=str(file)) as monitor:
        problem.step(optimizer)
        problem.step(optimizer)
    assert monitor.history[1] == {"step": 2}
    assert file.read_text().splitlines()[2] == "2,,,,"


def test_tensorboard(problem):
    class Writer:
        def __init__(self):
            self.calls = []

        def add_scalar(self, *call):
            self.calls.append(call)

    optimizer, writer = problem.optimizer("auto", rho=0.1), Writer()
    sharpness.Monitor(optimizer, every=1, log=writer)
    problem.step(optimizer)
    assert [call[0] for call in writer.calls] == [
        "sharpness/ascent", "sharpness/loss", "sharpness/perturbed_loss", "sharpness/grad_norm"
    ]  # fmt: skip
    assert {call[2] for call in writer.calls} == {1}


def test_two_phase_use_counts_steps_too(problem):
    optimizer = problem.optimizer("auto", rho=0.1)
    monitor = sharpness.Monitor(optimizer, *data_of(problem), every=2, measures="worst")
    for _ in range(2):
        problem.first_step(optimizer)
        optimizer.zero_grad()
        problem.backward()
        optimizer.second_step()
    assert [record["step"] for record in monitor.history] == [2]


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"optimizer": 1}, TypeError, "optimizer must be a FastSAM, got int"),
        ({"every": 0}, ValueError, "every must be a whole number >= 1"),
        ({"measures": ("flatness",)}, ValueError, "measures must be of ascent, .*, got 'flatness'"),
        ({"measures": ("ascent", "worst")}, ValueError, "needs model, loss_fn and data; only 'ascent' does not"),
        ({"log": 3}, TypeError, "log must be a function, a SummaryWriter or a path, got int"),
    ],
)
def test_refusals(problem, change, error, reason):
    with pytest.raises(error, match=reason):
        sharpness.Monitor(**{"optimizer": problem.optimizer("auto"), **change})


def test_schedule_of_rho_needs_a_radius(problem):
    optimizer = FastSAM(problem.params, rho=lambda step: 0.1, lr=0.1)
    with (
        sharpness.Monitor(optimizer, *data_of(problem), every=1, measures="worst"),
        pytest.raises(ValueError, match="the optimizer's rho is a schedule: give the Monitor a rho of its own"),
    ):
        problem.step(optimizer)
