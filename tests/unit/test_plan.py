"""The options of a step are worked out once, for as long as no option is another object."""

import pytest
import torch

from fastsam import FastSAM, methods
from fastsam.bases import FUSED
from fastsam.plan import KnownOptions

ADAM = FUSED[torch.optim.Adam]


def make_groups(**options):
    optimizer = FastSAM([torch.zeros(2, requires_grad=True)], torch.optim.Adam, **options)
    optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)], "lr": 0.5})
    return optimizer.param_groups


def add_a_group(groups):
    groups.append({**groups[0], "perturb": False})


def drop_a_group(groups):
    groups.pop()


CHANGES = {
    "lr": lambda groups: groups[1].update(lr=0.25),
    "equal lr": lambda groups: groups[1].update(lr=torch.tensor(0.5)),
    "betas": lambda groups: groups[0].update(betas=(0.5, 0.75)),
    "rho": lambda groups: groups[0].update(rho=0.25),
    "perturb": lambda groups: groups[1].update(perturb=False),
    "amsgrad": lambda groups: groups[0].update(amsgrad=True),
    "seed": lambda groups: groups[0].update(rounding="stochastic", rounding_seed=3),
    "one more group": add_a_group,
    "one less": drop_a_group,
}


def contents(options):
    return options.perturb, options.ascent, options.state_names, options.update


def fresh(groups, step=0, rho_scale=1.0):
    return contents(KnownOptions().of(groups, ADAM, step, rho_scale))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change(change):
    groups, known = make_groups(), KnownOptions()
    before = known.of(groups, ADAM, 0, 1.0)
    assert contents(before) == fresh(groups)
    assert known.of(groups, ADAM, 1, 1.0) is before
    change(groups)
    assert known.of(groups, ADAM, 2, 1.0) is not before
    assert contents(known.of(groups, ADAM, 2, 1.0)) == fresh(groups)


def test_a_scheduler_that_sets_lr_leaves_the_rest():
    groups, known = make_groups(), KnownOptions()
    before = known.of(groups, ADAM, 0, 1.0)
    assert contents(before) == fresh(groups)
    before.are_checked = True
    for step in range(1, 4):
        groups[0]["lr"] *= 0.5
        now = known.of(groups, ADAM, step, 1.0)
        assert contents(now) == fresh(groups)
        assert now.are_checked
        assert now.ascent is before.ascent
    groups[0]["lr"] = [0.5]
    assert not known.of(groups, ADAM, 4, 1.0).are_checked


def test_a_radius_by_lr_follows_it():
    groups, known = make_groups(rho=methods.RhoByLR(rho_max=0.5, lr_max=1.0, rho_min=0.1)), KnownOptions()
    rhos = []
    for lr in (0.0, 0.5, 1.0):
        groups[0]["lr"] = lr
        rhos.append(known.of(groups, ADAM, 0, 1.0).ascent[0].rho)
    assert rhos == pytest.approx([0.1, 0.3, 0.5])


def test_other_bases_and_scales():
    groups, known = make_groups(), KnownOptions()
    before = known.of(groups, ADAM, 0, 1.0)
    assert known.of(groups, None, 0, 1.0).update == []
    assert known.of(groups, None, 0, 1.0).state_names == ()
    assert known.of(groups, ADAM, 0, 0.5).ascent[0].rho == 0.5 * before.ascent[0].rho


def test_freed_numbers():
    """A new number may lie where one of the step before lay."""
    groups, known = make_groups(), KnownOptions()
    for step in range(100):
        groups[0]["lr"] = 1.0 / (step + 3)
        assert known.of(groups, ADAM, step, 1.0).update[0].lr == groups[0]["lr"]


def test_schedules_say_something_else_in_each_step():
    groups, known = make_groups(rho=lambda step: 0.5**step), KnownOptions()
    assert [known.of(groups, ADAM, step, 1.0).ascent[0].rho for step in range(3)] == [1.0, 0.5, 0.25]


def test_lists_may_be_written_to():
    groups, known = make_groups(), KnownOptions()
    groups[0]["betas"] = [0.5, 0.75]
    assert known.of(groups, ADAM, 0, 1.0).update[0].beta1 == 0.5
    groups[0]["betas"][0] = 0.25
    assert known.of(groups, ADAM, 1, 1.0).update[0].beta1 == 0.25


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_tensors_are_read_anew(backend):
    """The same tensor with another value, in rho and in lr."""
    param = torch.ones(3, requires_grad=True)
    rho, lr = torch.tensor(0.5), torch.tensor(0.0)
    optimizer = FastSAM([param], torch.optim.SGD, rho=rho, lr=lr, backend=backend)
    for value in (0.5, 2.0):
        rho.fill_(value)
        lr.fill_(value)
        param.grad = torch.tensor([3.0, 0.0, 4.0])
        before = param.detach().clone()
        optimizer.first_step(zero_grad=False)
        torch.testing.assert_close(param.detach() - before, value * param.grad / 5, rtol=1e-6, atol=1e-6)
        optimizer.second_step()
        torch.testing.assert_close(before - param.detach(), value * param.grad, rtol=1e-6, atol=1e-6)


def test_checked_again_after_a_change():
    param = torch.ones(3, requires_grad=True)
    optimizer = FastSAM([param], torch.optim.SGD, lr=0.1)
    for rounding in ("nearest", "up", "up"):
        param.grad = torch.ones(3)
        optimizer.param_groups[0]["rounding"] = rounding
        if rounding == "nearest":
            optimizer.first_step(zero_grad=False)
            optimizer.second_step()
        else:
            with pytest.raises(ValueError, match="rounding must be"):
                optimizer.first_step()
