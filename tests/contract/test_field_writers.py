"""Who else touches gradients and parameters: accumulation, other writers, caches; odd frozen parameters."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from checks import assert_all_close
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from fastsam import FastSAM, methods

pytestmark = pytest.mark.parametrize("backend", ["reference", "foreach", "native"])


def test_accumulation_before_a_closure_warns_once(backend):
    model = nn.Linear(3, 2)
    optimizer = FastSAM(model.parameters(), lr=0.1, backend=backend)

    def backward():
        model(torch.ones(4, 3)).square().sum().backward()

    backward()
    with pytest.warns(UserWarning, match="closures"):
        optimizer.step(backward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.zero_grad()
        backward()
        optimizer.step(backward)


def test_accumulation_is_seen_after_the_parameters_were_replaced(backend):
    """As Gaussian splatting does it: what stood for all is in no group any more."""
    optimizer = FastSAM([nn.Parameter(torch.ones(3))], lr=0.1, backend=backend)

    def backward():
        optimizer.param_groups[0]["params"][0].square().sum().backward()

    optimizer.step(backward)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(5))
    backward()
    optimizer.step(lambda: (optimizer.zero_grad(), backward()))
    optimizer.zero_grad()
    backward()
    with pytest.warns(UserWarning, match="closures"):
        optimizer.step(backward)


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"interval": 2}], ids=str)
def test_accumulation_before_a_step_of_one_pass_is_right(backend, options):
    w = nn.Parameter(torch.ones(3))
    optimizer = FastSAM([w], lr=0.1, backend=backend, **options)
    optimizer.step(lambda: w.sum().backward())
    optimizer.zero_grad()
    w.sum().backward()
    before = w.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: w.sum().backward())
    torch.testing.assert_close(w.detach(), before - 0.2)


def test_a_closure_that_never_clears_is_warned_of(backend):
    model = nn.Linear(3, 2)
    optimizer = FastSAM(model.parameters(), lr=0.01, backend=backend)

    def train():
        for _ in range(5):
            optimizer.step(lambda: model(torch.ones(4, 3)).square().sum().backward())

    with pytest.warns(UserWarning, match="Clear the gradients in the closure") as found:
        train()
    assert len(found) == 1


def test_gradients_that_are_cleared_by_data_do_not_warn(backend):
    model = nn.Linear(3, 2)
    optimizer = FastSAM(model.parameters(), lr=0.01, backend=backend)

    def closure():
        for param in model.parameters():
            if param.grad is not None:
                param.grad.data.zero_()
        model(torch.ones(4, 3)).square().sum().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            optimizer.step(closure)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_gradients_that_are_cleared_do_not_warn(backend, set_to_none, outside):
    model = nn.Linear(3, 2)
    optimizer = FastSAM(model.parameters(), lr=0.1, backend=backend)

    def closure():
        if not outside:
            optimizer.zero_grad(set_to_none)
        model(torch.ones(4, 3)).square().sum().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            if outside:
                optimizer.zero_grad(set_to_none)
            optimizer.step(closure)


@pytest.mark.parametrize("which", ["ascent_closure", "closure"])
def test_a_closure_that_leaves_no_gradient_is_refused(backend, which):
    w = nn.Parameter(torch.ones(3))
    optimizer = FastSAM([w], lr=0.1, backend=backend)

    def backward():
        w.square().sum().backward()

    arguments = {"closure": backward, "ascent_closure": backward, which: w.grad}
    arguments[which] = lambda: None
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.step(arguments["closure"], ascent_closure=arguments["ascent_closure"])
    assert torch.equal(w, torch.ones(3))
    assert not optimizer.perturbed


@pytest.mark.parametrize("how", ["the base", "its list"])
def test_a_parameter_that_came_by_the_base_is_watched_at_once(backend, how):
    w, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = FastSAM([w], lr=0.1, backend=backend)
    if how == "the base":
        optimizer.base_optimizer.add_param_group({"params": [late]})
    else:
        optimizer.param_groups[0]["params"].append(late)
    w.grad, late.grad = torch.ones(3), torch.ones(3)
    optimizer.first_step(zero_grad=False)
    with pytest.raises(RuntimeError, match="perturbed by it"):
        FastSAM([late], lr=0.1, backend=backend).first_step()
    torch.optim.SGD([late], lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"parameter 1 \(shape \(3,\)\) was written to"):
        optimizer.second_step()
    optimizer.restore()
    assert torch.equal(late, torch.ones(3))


@pytest.mark.parametrize("other", ["FastSAM", "SGD"])
def test_two_optimizers_between_the_phases_are_refused(backend, other):
    w = nn.Parameter(torch.ones(3))
    optimizer = FastSAM([w], lr=0.1, backend=backend)
    w.grad = torch.ones(3)
    optimizer.first_step(zero_grad=False)
    if other == "FastSAM":
        second = FastSAM([w], lr=0.1, backend=backend)
        with pytest.raises(RuntimeError, match="perturbed by it"):
            second.first_step()
    else:
        torch.optim.SGD([w], lr=0.1).step()
        with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \(3,\)\) was written to"):
            optimizer.second_step()
    optimizer.restore()
    assert torch.equal(w, torch.ones(3))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_the_step_that_makes_state_is_no_foreign_write(backend, base):
    """torch.distributed.checkpoint calls it; who writes in the step after it is still found."""
    w = nn.Parameter(torch.ones(3))
    optimizer = FastSAM([w], base, lr=0.1, backend=backend)
    get_optimizer_state_dict(nn.ParameterList([w]), optimizer)
    w.grad = torch.ones(3)
    optimizer.first_step(zero_grad=False)
    torch.optim.SGD([w], lr=0.1).step()
    with pytest.raises(RuntimeError, match="was written to"):
        optimizer.second_step()
    optimizer.restore()


@pytest.mark.parametrize("method", [methods.SAM(), methods.SAM(inner_steps=2), methods.MomentumSAM()], ids=str)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_closure_that_writes_to_perturbed_weights_is_refused(backend, method, steps):
    """One parameter of many: another optimizer's step in a closure would be undone by the restore."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(20)]
    optimizer = FastSAM(params, lr=0.1, momentum=0.9, method=method, backend=backend)
    other = torch.optim.SGD([params[13]], lr=0.1)

    def closure(writes=False):
        for param in params:
            param.grad = param.detach().clone()
        if writes and optimizer.perturbed:
            other.step()

    for _ in range(steps):
        optimizer.step(closure)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"parameter 13 \(shape \(3,\)\) was written to"):
        optimizer.step(lambda: closure(True))
    assert not optimizer.perturbed
    assert_all_close(params, before)


def test_what_is_not_perturbed_may_be_written_to(backend):
    w, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = FastSAM([{"params": [w]}, {"params": [other], "perturb": False}], lr=0.1, backend=backend)

    def closure():
        w.grad = w.detach().clone()
        with torch.no_grad():
            other.mul_(2)

    optimizer.step(closure)
    assert torch.equal(other, torch.full((3,), 4.0))


def test_a_write_is_refused_after_all_weights_were_loaded(backend):
    params = [nn.Parameter(torch.zeros(3)) for _ in range(20)]
    optimizer = FastSAM(params, lr=0.1, backend=backend)
    nn.ParameterList(params).load_state_dict({str(i): torch.ones(3) for i in range(20)})
    for param in params:
        param.grad = torch.ones(3)
    optimizer.first_step(zero_grad=False)
    torch.optim.SGD([params[13]], lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"parameter 13 \(shape \(3,\)\) was written to"):
        optimizer.second_step()
    optimizer.restore()
    assert_all_close(params, [torch.ones(3)] * 20)


def test_an_embedding_may_renormalize_itself(backend):
    model = nn.Embedding(4, 3, max_norm=1.0)
    optimizer = FastSAM(model.parameters(), lr=0.1, backend=backend)
    for _ in range(2):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.arange(4)).sum().backward()
            optimizer.second_step() if optimizer.perturbed else optimizer.first_step()


class PlusOne(nn.Module):
    def forward(self, w):
        return w + 1


def test_cached_parametrizations_see_the_perturbed_weights(backend):
    def train(is_cached):
        torch.manual_seed(0)
        model = nn.Linear(3, 2, bias=False)
        parametrize.register_parametrization(model, "weight", PlusOne())
        optimizer = FastSAM(model.parameters(), lr=0.1, rho=1.0, backend=backend)

        def closure():
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()

        if is_cached:
            with parametrize.cached():
                optimizer.step(closure)
        else:
            optimizer.step(closure)
        return model.parameters()

    assert_all_close(train(True), train(False))


FROZEN = {
    "int8": lambda w: torch.zeros(3, dtype=torch.int8),
    "float8": lambda w: torch.zeros(3).to(torch.float8_e4m3fn),
    "meta": lambda w: torch.zeros(3, device="meta"),
    "expanded": lambda w: torch.zeros(1).expand(3),
    "alias": lambda w: w.data,
}


@pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_may_be_of_any_kind(backend, make):
    w = nn.Parameter(torch.ones(3))
    frozen = nn.Parameter(make(w), requires_grad=False)
    optimizer = FastSAM([w, frozen], lr=0.1, rho=0.0, backend=backend)

    def closure():
        optimizer.zero_grad()
        w.square().sum().backward()

    optimizer.step(closure)
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.8))


def test_a_frozen_parameter_is_checked_when_it_has_a_gradient(backend):
    w, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(1).expand(3), requires_grad=False)
    optimizer = FastSAM([w, frozen], lr=0.1, backend=backend)
    w.grad, frozen.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"parameter 1 \(shape \(3,\)\): its elements overlap"):
        optimizer.first_step()


ANY_DEVICE = [methods.SAM(), methods.GSAM(), methods.RandomSAM(), methods.FriendlySAM()]


@pytest.mark.parametrize("method", ANY_DEVICE, ids=str)
def test_the_default_device_has_no_effect(backend, method):
    w = nn.Parameter(torch.ones(3))
    one, x = torch.ones(()), torch.ones(3)
    torch.set_default_device("meta")
    try:
        optimizer = FastSAM([w], torch.optim.AdamW, lr=0.1, method=method, replay_rng=True, backend=backend)
        for _ in range(2):
            optimizer.step(lambda: (optimizer.zero_grad(), (w * x).square().sum().backward(one)))
    finally:
        torch.set_default_device(None)
    assert bool(torch.isfinite(w).all())
    assert not torch.equal(w, torch.ones(3))


@pytest.mark.parametrize("kind", [tuple, nn.ParameterList])
def test_params_may_be_any_iterable(backend, kind):
    w = nn.Parameter(torch.ones(3))
    optimizer = FastSAM([{"params": kind([w])}], lr=0.1, rho=0.0, backend=backend)
    optimizer.param_groups[0]["params"] = kind([w])
    optimizer.step(lambda: w.sum().backward())
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.9))


def test_a_replaced_parameter_is_let_go(backend):
    """In steps without an ascent, too."""
    old = nn.Parameter(torch.ones(3))
    optimizer = FastSAM([old], lr=0.1, interval=1000, backend=backend)

    def step():
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones(3)
        optimizer.first_step()
        optimizer.step()

    step()
    step()
    alive = weakref.ref(old)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3))
    optimizer.state.clear()
    del old
    step()
    gc.collect()
    assert alive() is None
