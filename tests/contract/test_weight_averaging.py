"""torch.optim.swa_utils around FastSAM: averages are of restored weights, in closures and in two phases."""

import pytest
import torch
from problem import Problem
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn


def step(problem, optimizer, in_phases):
    if not in_phases:
        problem.step(optimizer)
        return
    problem.first_step(optimizer)
    optimizer.zero_grad()
    problem.backward()
    optimizer.second_step()


@pytest.mark.parametrize("in_phases", [False, True], ids=["closure", "two-phase"])
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_average_is_of_the_weights_between_steps(backend, device, kind, in_phases):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, rho=0.3)
    averaging = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if kind == "ema" else {}
    averaged = AveragedModel(problem.model, **averaging)
    seen = []
    for _ in range(3):
        step(problem, optimizer, in_phases)
        averaged.update_parameters(problem.model)
        seen.append([p.detach().clone() for p in problem.params])
    for i, average in enumerate(averaged.module.parameters()):
        first, second, third = (weights[i] for weights in seen)
        expected = (first + second + third) / 3 if kind == "swa" else (first + second) / 4 + third / 2
        torch.testing.assert_close(average.detach(), expected)


def test_swalr_sets_the_bases_rate():
    problem = Problem("cpu")
    optimizer = problem.optimizer("auto")
    schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2, anneal_strategy="linear")
    rates = []
    for _ in range(3):
        problem.step(optimizer)
        schedule.step()
        rates.append(optimizer.base_optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.06, 0.02, 0.02])


def test_update_bn_of_the_average():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    averaged = AveragedModel(model)
    x = torch.randn(64, 4)
    update_bn([x], averaged)
    torch.testing.assert_close(averaged.module[1].running_mean, averaged.module[0](x).mean(0).detach())
