"""Lines and planes of losses, their directions, their figures."""

import copy
import sys

import pytest
import torch
from checks import assert_same_bits
from torch import nn
from torch.nn import functional as F

from fastsam import sharpness


@pytest.fixture
def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(6, 3))
        data = [(torch.randn(9, 2, 4), torch.randint(3, (9,)))]
    return model, data


def test_line_is_loss_of_a_moved_copy(problem):
    model, data = problem
    model[3].bias.requires_grad_(False)
    direction = sharpness.filter_normalized(model, seed=1)
    before = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    line = sharpness.loss_line(model, F.cross_entropy, data, direction, [-0.5, 0.0, 0.5], train=True)
    assert_same_bits([t.detach() for t in (*model.parameters(), *model.buffers())], before)
    assert line.radii == [-0.5, 0.0, 0.5]
    for radius, loss in zip(line.radii, line.losses, strict=True):
        moved = copy.deepcopy(model).train()
        with torch.no_grad():
            for p, d in zip([p for p in moved.parameters() if p.requires_grad], direction, strict=True):
                p.add_(radius * d)
            assert loss == pytest.approx(F.cross_entropy(moved(data[0][0]), data[0][1]).item(), rel=1e-6)


def test_filter_normalized(problem):
    model, _ = problem
    direction = sharpness.filter_normalized(model)
    for p, d in zip(model.parameters(), direction, strict=True):
        if p.dim() == 1:
            assert not d.any()
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1))
    assert all(torch.equal(a, b) for a, b in zip(direction, sharpness.filter_normalized(model), strict=True))
    assert not torch.equal(direction[0], sharpness.filter_normalized(model, seed=1)[0])


def test_scale_of_filters_before_batch_norm_is_not_seen(problem):
    """Batch norm undoes the scale of the filters before it, if the direction scales with them."""
    model, data = problem
    larger = copy.deepcopy(model)
    with torch.no_grad():
        larger[0].weight.mul_(4)
        larger[0].bias.mul_(4)
    lines = [
        sharpness.loss_line(net, F.cross_entropy, data, sharpness.filter_normalized(net), [-0.3, 0.3], train=True)
        for net in (model, larger)
    ]
    assert lines[1].losses == pytest.approx(lines[0].losses, rel=1e-2)


def test_plane_and_difference(problem):
    model, data = problem
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    between = sharpness.difference(model, other)
    random = sharpness.filter_normalized(model)
    plane = sharpness.loss_plane(model, F.cross_entropy, data, (between, random), [0.0, 1.0], [-1.0, 0.0, 1.0])
    assert [len(row) for row in plane.losses] == [3, 3]
    assert plane.radii == ([0.0, 1.0], [-1.0, 0.0, 1.0])
    with torch.no_grad():
        ends = [F.cross_entropy(net.eval()(data[0][0]), data[0][1]).item() for net in (model, other)]
    assert [row[1] for row in plane.losses] == pytest.approx(ends, rel=1e-5)
    square = sharpness.loss_plane(model, F.cross_entropy, data, (between, random), [0.0, 1.0])
    assert square.radii == ([0.0, 1.0], [0.0, 1.0])


def test_figures(problem, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    line = sharpness.Line([-1.0, 0.0, 1.0], [2.0, 1.0, 2.0])
    axes = line.plot(label="loss")
    assert axes.lines[0].get_ydata().tolist() == line.losses
    assert line.plot(axes) is axes
    plane = sharpness.Plane(([0.0, 1.0], [-1.0, 0.0, 1.0]), [[1.0, 0.5, 1.0], [2.0, 1.5, 2.0]])
    axes = plane.plot(levels=5)
    assert axes.get_xlim() == (0.0, 1.0)
    assert axes.get_ylim() == (-1.0, 1.0)
    pyplot.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*matplotlib"):
        line.plot()
