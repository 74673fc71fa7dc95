"""model=: running statistics move in the first pass only, however the layer computes them."""

import copy

import pytest
import torch
from checks import assert_same_bits, values
from registry import BASES, every_base
from torch import nn

from fastsam import FastSAM

pytestmark = [pytest.mark.face, pytest.mark.usefixtures("one_thread")]


class Reassigning(nn.BatchNorm1d):
    """A forward of its own, which puts new tensors in its buffers' places, as many hand-written layers do."""

    def forward(self, x):
        mean, var = x.mean(0), x.var(0, unbiased=False)
        if self.training:
            with torch.no_grad():
                self.running_mean = 0.9 * self.running_mean + 0.1 * mean
                self.running_var = 0.9 * self.running_var + 0.1 * var
                self.num_batches_tracked = self.num_batches_tracked + 1
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


class InPlace(nn.modules.batchnorm._BatchNorm):
    """A subclass of what all batch norms have in common, which updates by its own rule."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(x.mean(0), 0.3)
                self.running_var.lerp_(x.var(0), 0.3)
                self.num_batches_tracked.add_(1)
        return (x - self.running_mean) / (self.running_var + self.eps).sqrt() * self.weight + self.bias


class Images(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), norm, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x.view(-1, 2, 4, 4))).mean((2, 3)))


def rows(norm):
    return nn.Sequential(nn.Linear(32, 4), norm, nn.Tanh(), nn.Linear(4, 3))


MODELS = {
    "1d": lambda: rows(nn.BatchNorm1d(4)),
    "2d": lambda: Images(nn.BatchNorm2d(4)),
    "sync": lambda: Images(nn.SyncBatchNorm(4)),
    "momentum-none": lambda: rows(nn.BatchNorm1d(4, momentum=None)),
    "no-affine": lambda: rows(nn.BatchNorm1d(4, affine=False)),
    "own-rule": lambda: rows(InPlace(4)),
    "new-tensors": lambda: rows(Reassigning(4)),
    "two-layers": lambda: nn.Sequential(rows(nn.BatchNorm1d(4)), nn.BatchNorm1d(3, momentum=0.5)),
    "frozen-among": lambda: nn.Sequential(rows(nn.BatchNorm1d(4)), nn.BatchNorm1d(3).eval()),
}


class Normed:
    """A model with batch norm, and a batch for it."""

    def __init__(self, make, device):
        torch.manual_seed(1)
        self.model = make().to(device)
        self.x, self.y = values((6, 32), torch.float32, device), values((6, 3), torch.float32, device, 2)

    def optimizer(self, backend, base="sgd", *, watched=True, **options):
        cls, base_options = BASES[base]
        model = self.model if watched else None
        return FastSAM(
            self.model.parameters(), cls, rho=0.5, backend=backend, model=model, **{**base_options, **options}
        )

    def backward(self, part=slice(None)):
        loss = (self.model(self.x[part]) - self.y[part]).square().mean()
        loss.backward()
        return loss

    def statistics(self):
        return {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}

    def after_one_pass(self, part=slice(None)):
        """The statistics that one pass at the present weights would leave."""
        other = copy.deepcopy(self.model)
        with torch.no_grad():
            other(self.x[part])
        return {name: buffer.detach().clone() for name, buffer in other.named_buffers()}


def assert_same_statistics(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert_same_bits(actual[name], value, name)


def differ(one, other):
    return any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("use", ["closure", "two-phase"])
def test_statistics_move_in_first_pass_only(backend, device, make, use):
    problem = Normed(make, device)
    optimizer = problem.optimizer(backend)
    for _ in range(3):
        before, expected = problem.statistics(), problem.after_one_pass()
        assert differ(before, expected)
        optimizer.zero_grad()
        if use == "closure":
            optimizer.step(problem.backward)
        else:
            problem.backward()
            optimizer.first_step()
            problem.backward()
            assert differ(problem.statistics(), expected), "the second pass was to move them"
            optimizer.second_step()
        assert_same_statistics(problem.statistics(), expected)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_buffers_stay_same_tensors(backend, device, make):
    """They may be shared, or captured in a graph: after a step they are those that the first pass left there."""
    problem = Normed(make, device)
    optimizer = problem.optimizer(backend)
    kept = []

    def closure():
        loss = problem.backward()
        kept.append(list(problem.model.buffers()))
        return loss

    optimizer.step(closure)
    assert all(now is then for now, then in zip(problem.model.buffers(), kept[0], strict=True))


def test_without_model_they_move_twice(backend, device):
    problem = Normed(MODELS["1d"], device)
    expected = problem.after_one_pass()
    problem.optimizer(backend, watched=False).step(problem.backward)
    assert int(problem.model[1].num_batches_tracked) == 2
    assert differ(problem.statistics(), expected)


def test_training_is_otherwise_same(backend, device):
    """In training mode the statistics are not used, so watching them changes no weight."""
    one, two = (Normed(MODELS["2d"], device) for _ in range(2))
    watched, unwatched = one.optimizer(backend), two.optimizer(backend, watched=False)
    for _ in range(3):
        watched.zero_grad()
        unwatched.zero_grad()
        watched.step(one.backward)
        unwatched.step(two.backward)
    assert_same_bits([p.detach() for p in one.model.parameters()], [p.detach() for p in two.model.parameters()])


def test_in_eval_mode_nothing_moves(backend, device):
    problem = Normed(MODELS["1d"], device)
    problem.model.eval()
    optimizer = problem.optimizer(backend)
    before = problem.statistics()
    optimizer.step(problem.backward)
    assert_same_statistics(problem.statistics(), before)


def test_layer_without_statistics_is_left_alone(backend, device):
    problem = Normed(lambda: rows(nn.BatchNorm1d(4, track_running_stats=False)), device)
    optimizer = problem.optimizer(backend)
    optimizer.step(problem.backward)
    assert problem.statistics() == {}


def test_layers_are_not_changed(backend, device):
    """Neither momentum nor mode: a compiled model would be compiled again."""
    problem = Normed(MODELS["1d"], device)
    optimizer = problem.optimizer(backend)
    layer, seen = problem.model[1], []

    def closure():
        seen.append((layer.momentum, layer.training, layer.track_running_stats))
        return problem.backward()

    optimizer.step(closure)
    assert seen == [(0.1, True, True)] * 2


@every_base
@pytest.mark.parametrize("make", [MODELS["1d"], MODELS["new-tensors"]], ids=["1d", "new-tensors"])
def test_second_pass_that_raises_leaves_them_as_after_first(backend, device, base, make):
    problem = Normed(make, device)
    optimizer = problem.optimizer(backend, base)
    for _ in range(2):
        expected, calls = problem.after_one_pass(), []

        def closure(calls=calls):
            problem.backward()
            calls.append(1)
            if len(calls) == 2:
                raise ValueError("enough")

        with pytest.raises(ValueError, match="enough"):
            optimizer.step(closure)
        assert_same_statistics(problem.statistics(), expected)


def test_restore_leaves_them_as_after_first_pass(backend, device):
    problem = Normed(MODELS["1d"], device)
    optimizer = problem.optimizer(backend)
    expected = problem.after_one_pass()
    problem.backward()
    optimizer.first_step()
    problem.backward()
    optimizer.restore()
    assert_same_statistics(problem.statistics(), expected)
    # A pass that is no part of a step moves them as ever.
    expected = problem.after_one_pass()
    problem.backward()
    optimizer.restore()
    assert_same_statistics(problem.statistics(), expected)


def test_several_backwards_per_phase_count_as_first_pass(backend, device):
    """Accumulation: everything before first_step() is the first pass."""
    problem = Normed(MODELS["1d"], device)
    optimizer = problem.optimizer(backend)
    for part in (slice(0, 3), slice(3, 6)):
        problem.backward(part)
    expected = problem.statistics()
    optimizer.first_step()
    for part in (slice(0, 3), slice(3, 6)):
        problem.backward(part)
    optimizer.second_step()
    assert_same_statistics(problem.statistics(), expected)
    assert int(problem.model[1].num_batches_tracked) == 2


def test_with_ascent_closure_its_pass_is_first(backend, device):
    problem = Normed(MODELS["1d"], device)
    optimizer = problem.optimizer(backend)
    expected = problem.after_one_pass(slice(0, 4))
    optimizer.step(problem.backward, ascent_closure=lambda: problem.backward(slice(0, 4)))
    assert_same_statistics(problem.statistics(), expected)


def test_perturbation_over_frozen_batch_norms_still_watches_them(backend, device):
    """The model need not be what is optimized."""
    problem = Normed(MODELS["1d"], device)
    optimizer = FastSAM(problem.model[3].parameters(), lr=0.1, model=problem.model, backend=backend)
    expected = problem.after_one_pass()
    optimizer.step(problem.backward)
    assert_same_statistics(problem.statistics(), expected)


def test_model_that_is_cast_between_two_steps(backend, device):
    problem = Normed(MODELS["1d"], device)
    optimizer = problem.optimizer(backend)
    optimizer.step(problem.backward)
    problem.model.double()
    problem.x, problem.y = problem.x.double(), problem.y.double()
    optimizer.zero_grad()
    expected = problem.after_one_pass()
    optimizer.step(problem.backward)
    assert_same_statistics(problem.statistics(), expected)


def test_layers_that_share_buffer(backend, device):
    problem = Normed(MODELS["two-layers"], device)
    first, second = problem.model[0][1], nn.BatchNorm1d(4).to(device)
    second.running_mean = first.running_mean
    problem.model[0].insert(2, second)
    optimizer = problem.optimizer(backend)
    expected = problem.after_one_pass()
    optimizer.step(problem.backward)
    assert_same_statistics(problem.statistics(), expected)


def test_copy_of_model_and_optimizer_watches_copy(backend, device):
    problem = Normed(MODELS["1d"], device)
    optimizer = problem.optimizer(backend)
    optimizer.step(problem.backward)
    other = object.__new__(Normed)
    other.x, other.y = problem.x, problem.y
    other.model, twin = copy.deepcopy((problem.model, optimizer))
    untouched, expected = problem.statistics(), other.after_one_pass()
    twin.zero_grad()
    twin.step(other.backward)
    assert_same_statistics(other.statistics(), expected)
    assert_same_statistics(problem.statistics(), untouched)
