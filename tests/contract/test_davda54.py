"""fastsam.davda54.SAM: the signature, the contract and the numbers of davda54/sam, without its faults."""

import copy
import inspect

import pytest
import torch
from checks import assert_same_bits, assert_within, values
from problem import Problem, Snapshot, assert_same_state, state_of
from registry import BASES, every_base
from torch import nn

from fastsam import FastSAM
from fastsam.davda54 import SAM

pytestmark = pytest.mark.face


class Davda54:
    """The algorithm of https://github.com/davda54/sam, one tensor at a time, over a torch optimizer."""

    def __init__(self, params, base, rho, adaptive, **options):
        self.base, self.rho, self.adaptive = base(params, foreach=False, **options), rho, adaptive
        self.old = {}

    @property
    def params(self):
        return [p for group in self.base.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self):
        weighted = [(p.abs() if self.adaptive else 1.0) * p.grad for p in self.params]
        grad_norm = torch.stack([t.norm(p=2) for t in weighted]).norm(p=2)
        scale = self.rho / (grad_norm + 1e-12)
        for p in self.params:
            self.old[p] = p.detach().clone()
            p.add_((p.pow(2) if self.adaptive else 1.0) * p.grad * scale)
        self.base.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.params:
            p.copy_(self.old[p])
        self.base.step()
        self.base.zero_grad()


class Task(Problem):
    """The problem of the other tests, over SAM."""

    def sam(self, backend, base="sgd", **options):
        cls, base_options = BASES[base]
        return SAM(self.model.parameters(), cls, backend=backend, **{**base_options, **options})

    def readme_two_steps(self, optimizer):
        self.backward()
        optimizer.first_step(zero_grad=True)
        self.backward()
        optimizer.second_step(zero_grad=True)

    def readme_closure(self, optimizer):
        def closure():
            loss = self.loss()
            loss.backward()
            return loss

        loss = self.loss()
        loss.backward()
        optimizer.step(closure)
        optimizer.zero_grad()
        return loss


# ---- signature ----


def test_signature_is_davda54s():
    parameters = inspect.signature(SAM).parameters
    assert list(parameters) == ["params", "base_optimizer", "rho", "adaptive", "kwargs"]
    assert parameters["base_optimizer"].default is inspect.Parameter.empty
    assert parameters["rho"].default == 0.05
    assert parameters["adaptive"].default is False
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    for name in ("first_step", "second_step"):
        method = inspect.signature(getattr(SAM, name)).parameters
        assert list(method) == ["self", "zero_grad"]
        assert method["zero_grad"].default is False
    assert list(inspect.signature(SAM.step).parameters)[1:] == ["closure"]
    assert inspect.signature(SAM.step).parameters["closure"].default is None
    assert issubclass(SAM, FastSAM)


def test_arguments_by_position():
    params = [nn.Parameter(torch.ones(2))]
    optimizer = SAM(params, torch.optim.SGD, 0.2, True, lr=0.5, momentum=0.9)
    (group,) = optimizer.param_groups
    assert [group[name] for name in ("rho", "adaptive", "lr", "momentum")] == [0.2, True, 0.5, 0.9]
    assert type(optimizer.base_optimizer) is torch.optim.SGD
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups


def test_bad_arguments():
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="rho must be"):
        SAM(params, torch.optim.SGD, rho=-0.05, lr=0.1)
    with pytest.raises(TypeError, match="base must be a class"):
        SAM(params, torch.optim.SGD(params, lr=0.1))
    with pytest.raises(TypeError, match="base_optimizer"):
        SAM(params, lr=0.1)
    with pytest.raises(ValueError, match=r"replay_rng is FastSAM's"):
        SAM(params, torch.optim.SGD, lr=0.1, replay_rng=True)
    SAM(params, torch.optim.SGD, lr=0.1, replay_rng=False)


# ---- numbers ----


@every_base
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("use", ["two-steps", "closure"])
def test_steps_are_davda54s(backend, device, base, adaptive, use):
    mine, theirs = Task(device), Task(device)
    cls, options = BASES[base]
    rho = 0.5 if adaptive else 0.05
    optimizer = mine.sam(backend, base, rho=rho, adaptive=adaptive)
    other = Davda54(theirs.params, cls, rho, adaptive, **options)
    for step in range(5):
        # Each step from the same weights: what is compared is a step, not how errors grow.
        with torch.no_grad():
            for p, q in zip(mine.params, theirs.params, strict=True):
                q.copy_(p)
        start = mine.weights()
        # The gradients at the perturbed weights differ by rounding, which the model enlarges: both get the same.
        mine.backward()
        theirs.backward()
        assert_same_bits([q.grad for q in theirs.params], [p.grad for p in mine.params])
        second = [values(p.shape, p.dtype, device, seed=10 * step + i) for i, p in enumerate(mine.params)]
        perturbed = []

        def closure(perturbed=perturbed, second=second):
            perturbed += mine.weights()
            for p, g in zip(mine.params, second, strict=True):
                p.grad = g.clone()

        if use == "closure":
            optimizer.step(closure)
        else:
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step()
        optimizer.zero_grad()
        other.first_step()
        assert_within(perturbed, theirs.weights(), start, "perturbed")
        for q, g in zip(theirs.params, second, strict=True):
            q.grad = g.clone()
        other.second_step()
        assert_within(mine.weights(), theirs.weights(), start, f"step {step}")


@every_base
@pytest.mark.parametrize("use", ["readme_two_steps", "readme_closure"])
def test_run_follows_davda54s(backend, device, base, use):
    """Nothing equalized on the way: so errors grow a little, over twenty steps."""
    mine, theirs = Task(device), Task(device)
    cls, options = BASES[base]
    optimizer, other = mine.sam(backend, base), Davda54(theirs.params, cls, 0.05, False, **options)
    start = mine.weights()
    for _ in range(20):
        getattr(mine, use)(optimizer)
        theirs.readme_two_steps(_Adapter(other))
    torch.testing.assert_close(mine.weights(), theirs.weights(), rtol=1e-4, atol=1e-5)
    assert float((mine.weights()[0] - start[0]).abs().max()) > 0.01


class _Adapter:
    """``zero_grad`` is always on in the transcription."""

    def __init__(self, sam):
        self.first_step, self.second_step = (lambda zero_grad: sam.first_step()), (lambda zero_grad: sam.second_step())


@every_base
def test_same_bits_as_fastsam(backend, device, base):
    mine, theirs = Task(device), Task(device)
    cls, options = BASES[base]
    sam = mine.sam(backend, base)
    fast = FastSAM(theirs.params, cls, backend=backend, **options)
    for _ in range(3):
        mine.readme_closure(sam)
        theirs.step(fast)
        assert_same_bits(mine.weights(), theirs.weights())
    assert_same_state(state_of(sam), state_of(fast))


# ---- contract ----


@every_base
def test_closure_is_called_once_with_gradients_cleared(backend, device, base):
    task = Task(device)
    optimizer = task.sam(backend, base)
    calls = []

    def closure():
        calls.append((torch.is_grad_enabled(), [p.grad for p in task.params], task.weights()))
        return task.backward()

    start = task.weights()
    task.backward()
    with torch.no_grad():
        optimizer.step(closure)
    ((enabled, grads, weights),) = calls
    assert enabled
    assert grads == [None] * 4
    assert not torch.equal(weights[0], start[0])
    assert not optimizer.perturbed
    assert all(p.grad is not None for p in task.params)


@pytest.mark.parametrize("zero_grad", [False, True, None], ids=["kept", "cleared", "default"])
def test_gradients_are_kept_unless_told(backend, device, zero_grad):
    task = Task(device)
    optimizer = task.sam(backend)
    arguments = {} if zero_grad is None else {"zero_grad": zero_grad}
    for phase in (optimizer.first_step, optimizer.second_step):
        task.backward()
        phase(**arguments)
        assert [p.grad is None for p in task.params] == [zero_grad is True] * 4
        optimizer.zero_grad()


def test_step_without_closure_is_second_phase_or_error(backend, device):
    task = Task(device)
    optimizer = task.sam(backend)
    task.backward()
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) needs a closure"):
        optimizer.step()
    before.assert_unchanged()
    optimizer.first_step(zero_grad=True)
    task.backward()
    assert optimizer.step() is None
    assert not optimizer.perturbed


def test_hooks_run_once_per_step(backend, device):
    task = Task(device)
    optimizer = task.sam(backend)
    calls = []
    optimizer.register_step_pre_hook(lambda o, a, k: calls.append("pre"))
    optimizer.register_step_post_hook(lambda o, a, k: calls.append("post"))
    task.readme_closure(optimizer)
    task.readme_two_steps(optimizer)
    assert calls == ["pre", "post"] * 2


def test_model_is_fastsams(backend, device):
    task = Task(device)
    task.model.insert(1, nn.BatchNorm1d(6).to(device))
    optimizer = task.sam(backend, model=task.model)
    task.readme_closure(optimizer)
    task.readme_two_steps(optimizer)
    assert int(task.model[1].num_batches_tracked) == 2


def test_grad_scaler(backend, device):
    one, two = Task(device), Task(device)
    scaled, plain = one.sam(backend), two.sam(backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for _ in range(3):
        scaler.scale(one.loss()).backward()
        scaled.first_step(zero_grad=True)
        scaler.scale(one.loss()).backward()
        scaler.step(scaled)
        scaler.update()
        scaled.zero_grad()
        two.readme_two_steps(plain)
    assert_same_bits(one.weights(), two.weights())


# ---- its faults ----


@every_base
def test_state_dict_has_momentum_and_no_weights(backend, device, base):
    task, other = Task(device), Task(device)
    optimizer = task.sam(backend, base)
    for _ in range(2):
        task.readme_two_steps(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    names = {name for entries in state["state"].values() for name in entries}
    assert "old_p" not in names
    assert (
        names
        == {
            "sgd": {"momentum_buffer"},
            "adamw": {"exp_avg", "exp_avg_sq", "step"},
            "rmsprop": {"square_avg", "momentum_buffer", "step"},
        }[base]
    )
    resumed = other.sam(backend, base)
    other.model.load_state_dict(task.model.state_dict())
    resumed.load_state_dict(state)
    for each, sam in ((task, optimizer), (other, resumed)):
        each.readme_two_steps(sam)
    assert_same_bits(other.weights(), task.weights())


@pytest.mark.parametrize("use", ["closure", "first_step"])
def test_no_gradient_at_all_is_refused(backend, device, use):
    task = Task(device)
    optimizer = task.sam(backend)
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient; call backward\(\) first"):
        optimizer.step(task.backward) if use == "closure" else optimizer.first_step(zero_grad=True)
    before.assert_unchanged()


@pytest.mark.parametrize("use", ["readme_two_steps", "readme_closure"])
@pytest.mark.filterwarnings("error")
def test_schedulers_do_not_warn(backend, device, use):
    task = Task(device)
    optimizer = task.sam(backend)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        getattr(task, use)(optimizer)
        scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)


def test_bn_helpers_of_its_readme_still_work(backend, device):
    """disable_running_stats and enable_running_stats, which set the layers' momentum around the second pass."""
    task = Task(device)
    layer = nn.BatchNorm1d(6).to(device)
    task.model.insert(1, layer)
    optimizer = task.sam(backend)
    task.backward()
    expected = layer.running_mean.clone()
    optimizer.first_step(zero_grad=True)
    layer.momentum = 0
    task.backward()
    layer.momentum = 0.1
    optimizer.second_step(zero_grad=True)
    assert_same_bits(layer.running_mean, expected)
