"""What surrounds FastSAM: bases with ways of their own, checkpoints of others, wrappers, signals."""

import copy
import signal

import pytest
import torch
from checks import assert_all_close
from fuzz_lives import Bytes
from small_models import X, closure_of, make_model
from torch import nn
from wrappers import CopyingWrapper, ForwardingWrapper

from fastsam import FastSAM, methods

pytestmark = pytest.mark.parametrize("backend", ["reference", "foreach", "native"])


def test_a_base_sees_its_own_keys_and_loads_by_itself(backend):
    def make(model):
        groups = [{"params": [p], "size": 0.1, "rho": 0.25 * i} for i, p in enumerate(model.parameters())]
        return FastSAM(groups, Bytes, backend=backend)

    model = make_model()
    optimizer = make(model)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, model))
    saved, twin = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    resumed = make(twin)
    resumed.load_state_dict(saved)
    assert resumed.state["steps"] == 2
    assert [group["rho"] for group in resumed.param_groups] == [0.0, 0.25, 0.5, 0.75]
    assert all(resumed.state[p]["bytes"].dtype == torch.uint8 for p in twin.parameters())
    optimizer.step(closure_of(optimizer, model))
    resumed.step(closure_of(resumed, twin))
    assert_all_close(twin.parameters(), model.parameters(), rtol=0, atol=0)


class Uncloneable(torch.Tensor):
    """As torchao's quantised states: a kind of tensor that knows few operators."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ == "clone":
            raise NotImplementedError("clone")
        return super().__torch_function__(function, types, args, kwargs or {})


class KeepsItsOwnKind(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for param in self.param_groups[0]["params"]:
            self.state[param]["own"] = torch.ones(3).as_subclass(Uncloneable)


def test_state_of_a_kind_of_its_own_is_loaded_as_it_is(backend):
    model, twin = make_model(), make_model()
    optimizer, resumed = (FastSAM(m.parameters(), KeepsItsOwnKind, lr=0.1, backend=backend) for m in (model, twin))
    optimizer.step(closure_of(optimizer, model))
    resumed.load_state_dict(optimizer.state_dict())
    assert all(type(entries["own"]) is Uncloneable for entries in resumed.state.values())


def test_a_base_without_a_learning_rate_may_be_refused_by_name(backend):
    model = make_model()
    groups = [{"params": [p], "size": 0.1} for p in model.parameters()]
    optimizer = FastSAM(groups, Bytes, rho=methods.RhoByLR(0.1, 0.1), backend=backend)
    with pytest.raises(ValueError, match="lr must be a number"):
        optimizer.step(closure_of(optimizer, model))


@pytest.mark.parametrize("how", ["pre-hook", "post-hook", "patched"])
def test_what_is_put_on_the_base_runs(backend, how):
    model, twin, calls = make_model(), make_model(), []
    optimizer = FastSAM(model.parameters(), lr=0.1, momentum=0.9, backend=backend)
    base = optimizer.base_optimizer
    weights = [p.detach().clone() for p in model.parameters()]
    if how == "patched":
        step = base.step
        base.step = lambda: (calls.append(1), step())[1]
    elif how == "pre-hook":
        exact = {"rtol": 0, "atol": 0}
        base.register_step_pre_hook(
            lambda *_: (calls.append(1), assert_all_close(model.parameters(), weights, **exact))[0]
        )
    else:
        base.register_step_post_hook(lambda *_: calls.append(1))
    plain = FastSAM(twin.parameters(), lr=0.1, momentum=0.9, backend=backend)
    optimizer.step(closure_of(optimizer, model))
    plain.step(closure_of(plain, twin))
    assert calls == [1]
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_scheduler_on_the_base_schedules(backend, recwarn):
    model = make_model()
    optimizer = FastSAM(model.parameters(), lr=0.1, backend=backend)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer, 1, 0.5)
    optimizer.step(closure_of(optimizer, model))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert not recwarn.list


BASES = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_checkpoints_of_davda54(backend, base):
    model = make_model()
    saved = base(model.parameters(), lr=0.1).state_dict()
    saved["state"] = {i: {"old_p": p.detach().clone()} for i, p in enumerate(model.parameters())}
    saved["param_groups"][0].update(rho=0.2, adaptive=False)
    optimizer = FastSAM(model.parameters(), base, lr=0.1, backend=backend)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rho"] == 0.2
    assert not optimizer.state
    optimizer.step(closure_of(optimizer, model))


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_what_the_base_is_given_by_itself(backend, base):
    model = make_model()
    plain = base(model[0].parameters(), lr=0.1)
    closure_of(plain, model)()
    plain.step()
    optimizer = FastSAM([{"params": list(model[0].parameters()), "rho": 0.3}], base, lr=0.1, backend=backend)
    optimizer.base_optimizer.load_state_dict(plain.state_dict())
    optimizer.base_optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.step(closure_of(optimizer, model))
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.05]


def test_only_kept_state_is_a_methods(backend):
    model = make_model()
    for method in (methods.GSAM(), methods.LookSAM(k=2)):
        optimizer = FastSAM(model.parameters(), lr=0.1, method=method, backend=backend)
        optimizer.step(closure_of(optimizer, model))
        plain = FastSAM(model.parameters(), lr=0.1, backend=backend)
        if method.state_name is None:
            plain.load_state_dict(optimizer.state_dict())
        else:
            with pytest.raises(ValueError, match="LookSAM"):
                plain.load_state_dict(optimizer.state_dict())


def test_a_resized_parameter_with_method_state(backend):
    w = nn.Parameter(torch.ones(3))
    optimizer = FastSAM([w], lr=0.1, method=methods.LookSAM(k=2), backend=backend)
    optimizer.step(lambda: (optimizer.zero_grad(), w.square().sum().backward()))
    w.data = torch.ones(5)
    w.grad = None

    def train():
        for _ in range(2):
            optimizer.step(lambda: (optimizer.zero_grad(), w.square().sum().backward()))

    with pytest.raises(RuntimeError, match=r"optimizer.state\[parameter\].pop\('(\w+)'\)") as error:
        train()
    optimizer.state[w].pop(str(error.value).split("'")[-2])
    train()


@pytest.mark.parametrize("wrapper", [CopyingWrapper, ForwardingWrapper])
@pytest.mark.parametrize("end", ["step", "second_step"])
@pytest.mark.parametrize("interval", [1, 2])
def test_two_phases_through_a_wrapper(backend, wrapper, end, interval):
    def train(wrap):
        model = make_model()
        raw = FastSAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, interval=interval, backend=backend)
        optimizer = wrap(raw)
        for _ in range(4):
            model(X).square().sum().backward()
            if optimizer.first_step():
                model(X).square().sum().backward()
            getattr(optimizer, end)()
            optimizer.zero_grad()
            assert not optimizer.perturbed
            assert not raw.perturbed
        return model.parameters()

    assert_all_close(train(wrapper), train(lambda optimizer: optimizer), rtol=0, atol=0)


@pytest.mark.parametrize("wrapper", [CopyingWrapper, ForwardingWrapper])
def test_a_wrapper_adds_groups_and_loads(backend, wrapper):
    model = make_model()
    raw = FastSAM(model[0].parameters(), lr=0.1, momentum=0.9, backend=backend)
    optimizer = wrapper(raw)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.step(closure_of(optimizer, model))
    assert len(raw.param_groups) == 2
    assert len(raw.state) == 4
    saved = copy.deepcopy(raw.state_dict())
    optimizer.step(closure_of(optimizer, model))
    optimizer.load_state_dict(saved)
    for index, param in enumerate(model.parameters()):
        assert torch.equal(raw.state[param]["momentum_buffer"], saved["state"][index]["momentum_buffer"])


@pytest.mark.parametrize("wrapper", [CopyingWrapper, ForwardingWrapper])
@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaler_steps_a_wrapper(backend, wrapper, overflow):
    """GradScaler sets ``grad_scale`` and ``found_inf`` on the wrapper; the optimizer that it wraps must see them."""

    def train(wrap):
        model = make_model()
        optimizer = wrap(FastSAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, backend=backend))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(model(X).square().sum()).backward()
        optimizer.first_step()
        scaler.scale(model(X).square().sum()).backward()
        if overflow:
            model[0].weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        assert not hasattr(optimizer, "found_inf")
        return model.parameters()

    assert_all_close(train(wrapper), train(lambda optimizer: optimizer), rtol=0, atol=0)
    if overflow:
        assert_all_close(train(wrapper), make_model().parameters(), rtol=0, atol=0)


def test_a_copy_is_a_view(backend):
    model = make_model()
    optimizer = FastSAM(model.parameters(), lr=0.1, backend=backend)
    view = copy.copy(optimizer)
    model(X).square().sum().backward()
    view.first_step()
    assert optimizer.perturbed
    optimizer.restore()
    assert_all_close(model.parameters(), make_model().parameters(), rtol=0, atol=0)


LOST = [{"method": methods.GSAM()}, {"interval": 2}, {"replay_rng": True}]


@pytest.mark.parametrize("options", LOST, ids=str)
def test_groups_do_not_hold_every_option(backend, options):
    """Horovod's ``type(optimizer)(optimizer.param_groups)`` must not silently make another optimizer."""
    optimizer = FastSAM(make_model().parameters(), lr=0.1, backend=backend, **options)
    with pytest.raises(TypeError, match="param_groups of another FastSAM"):
        type(optimizer)(optimizer.param_groups)
    again = type(optimizer)(optimizer.param_groups, backend=backend, **options)
    assert again.method == optimizer.method


class OwnState(torch.optim.SGD):
    """Keeps its state in a plain dict that cannot be replaced."""

    def __init__(self, params, lr):
        self._own = {}
        super().__init__(params, lr)

    @property
    def state(self):
        return self._own

    @state.setter
    def state(self, state):
        pass

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.sub_(param.grad, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("method", [methods.SAM(), methods.LookSAM(k=2), methods.FriendlySAM()], ids=str)
def test_a_state_that_is_a_plain_dict(backend, method):
    model, twin = make_model(), make_model()
    optimizer = FastSAM(model.parameters(), OwnState, lr=0.1, method=method, backend=backend)
    plain = FastSAM(twin.parameters(), lr=0.1, method=method, backend=backend)
    for _ in range(4):
        optimizer.step(closure_of(optimizer, model))
        plain.step(closure_of(plain, twin))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM], ids=str)
def test_a_handler_that_raises_waits_for_the_end_of_the_update(backend, number):
    def stop(*_):
        raise Stop

    model = make_model()
    optimizer = FastSAM(model.parameters(), lr=0.1, backend=backend)
    optimizer.step(closure_of(optimizer, model))
    descend = optimizer._engine.descend
    optimizer._engine.descend = lambda *args: (signal.raise_signal(number), descend(*args))
    before, previous = [p.detach().clone() for p in model.parameters()], signal.signal(number, stop)
    try:
        with pytest.raises(Stop):
            optimizer.step(closure_of(optimizer, model))
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, previous)
    assert not optimizer.perturbed
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_step_without_a_closure_names_what_works(backend):
    model = make_model()
    optimizer = FastSAM(model.parameters(), lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match=r"opacus.*first_step\(\).*learning-rate finder.*base_optimizer"):
        optimizer.step()
