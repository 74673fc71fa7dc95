"""What users' gradients are like: without an address, shared, expanded, in buffers, made in inference mode."""

import copy

import pytest
import torch
from checks import assert_all_close
from torch import nn

from fastsam import FastSAM, methods, schedules

pytestmark = pytest.mark.parametrize("backend", ["reference", "foreach", "native"])


def gradient_without_address(kind):
    if kind == "zero tensor":
        return torch._efficientzerotensor((4,)), torch.zeros(4)
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    return AsyncCollectiveTensor(values.clone()), values


@pytest.mark.parametrize("kind", ["zero tensor", "wrapper subclass"])
def test_a_gradient_without_an_address_counts(backend, kind):
    def train(special):
        params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))]
        optimizer = FastSAM(params, lr=0.1, rho=0.5, momentum=0.9, backend=backend)
        for _ in range(4):
            params[0].grad = gradient_without_address(kind)[0 if special else 1]
            params[1].grad = torch.ones(2)
            optimizer.second_step() if optimizer.perturbed else optimizer.first_step()
        return params

    assert_all_close(train(True), train(False))


@pytest.mark.parametrize("what", ["gradient", "state"])
def test_freed_storage_is_refused_by_name(backend, what):
    w = nn.Parameter(torch.ones(4))
    optimizer = FastSAM([w], lr=0.1, momentum=0.9, backend=backend)
    w.grad = torch.ones(4)
    optimizer.first_step(zero_grad=False)
    optimizer.second_step()
    before = w.detach().clone()
    freed = w.grad if what == "gradient" else optimizer.state[w]["momentum_buffer"]
    freed.untyped_storage().resize_(0)

    def step():
        optimizer.first_step(zero_grad=False)
        optimizer.second_step()

    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \(4,\)\).*has no memory"):
        step()
    optimizer.restore()
    assert torch.equal(w, before)


def test_storage_freed_while_perturbed_is_refused_by_name(backend):
    w = nn.Parameter(torch.ones(4))
    optimizer = FastSAM([w], lr=0.1, backend=backend)
    w.grad = torch.ones(4)
    optimizer.first_step(zero_grad=False)
    size = w.untyped_storage().nbytes()
    w.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \(4,\)\).*freed while it was perturbed"):
        optimizer.restore()
    w.untyped_storage().resize_(size)
    optimizer.restore()
    assert torch.equal(w, torch.ones(4))


class Subclass(torch.Tensor):
    """A subclass with memory of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("mul", "add", "sub", "add_", "mul_", "_foreach_mul", "_foreach_add_"):
            raise TypeError(f"{function.__name__} of a Subclass")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("method", [methods.SAM(), methods.GSAM(), methods.FriendlySAM()], ids=str)
def test_a_gradient_of_a_subclass_is_its_memory(backend, method):
    def train(special):
        w = nn.Parameter(torch.ones(4))
        optimizer = FastSAM([w], lr=0.1, rho=0.5, momentum=0.9, method=method, backend=backend)

        def closure():
            grad = w.detach().pow(2)
            w.grad = grad.as_subclass(Subclass) if special else grad

        for _ in range(3):
            optimizer.step(closure)
        return [w]

    assert_all_close(train(True), train(False))


SHARING = [methods.SAM(), methods.GSAM(), methods.WSAM(), methods.LookSAM(k=2), methods.FriendlySAM()]


@pytest.mark.parametrize("method", SHARING, ids=str)
def test_gradients_of_another_model_may_be_shared(backend, method):
    """As in ikostrikov/pytorch-a3c: ``.grad`` is another model's tensor, which it accumulates into in place."""

    def train(shared):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        local = copy.deepcopy(model)
        optimizer = FastSAM(model.parameters(), lr=0.1, rho=0.5, method=method, backend=backend)

        def closure():
            local.load_state_dict(model.state_dict())
            local.zero_grad(set_to_none=not shared)
            local(torch.ones(4, 3)).square().sum().backward()
            for mine, its in zip(model.parameters(), local.parameters(), strict=True):
                mine.grad = its.grad

        for _ in range(3):
            optimizer.step(closure)
        return model.parameters()

    assert_all_close(train(True), train(False))


def give_one_tensor(params, grad):
    for param in params:
        param.grad = grad


def give_expanded_ones(params, grad):
    for param in params:
        param.grad = grad.sum().expand(4)


def give_inference_tensors(params, grad):
    with torch.inference_mode():
        for param in params:
            param.grad = grad * 1


def give_lazy_clones(params, grad):
    for param in params:
        param.grad = torch._lazy_clone(grad)


READ_ONLY = [give_one_tensor, give_expanded_ones, give_inference_tensors, give_lazy_clones]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=["fused", "unfused"])
@pytest.mark.parametrize("method", SHARING, ids=str)
@pytest.mark.parametrize("give", READ_ONLY, ids=lambda give: give.__name__)
def test_gradients_that_cannot_be_written_to(backend, give, method, base):
    """As ``torch.autograd.grad`` returns them: one tensor for two parameters, expanded ones."""

    def train(plain):
        params = [nn.Parameter(torch.linspace(0.5, 1.5, 4)), nn.Parameter(torch.linspace(2.0, 1.0, 4))]
        optimizer = FastSAM(params, base, lr=0.02, rho=0.3, method=method, backend=backend)

        def closure():
            give(params, params[0].detach().square() * params[1].detach() - 0.1)
            for param in params if plain else ():
                param.grad = param.grad.clone()

        for _ in range(4):
            optimizer.step(closure)
        return params

    assert_all_close(train(False), train(True))


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop], ids=["fused", "unfused"])
def test_inference_mode_has_no_effect(backend, base):
    """What is allocated in it could not be written to outside of it."""

    def train(modes):
        w = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        optimizer = FastSAM([w], base, lr=0.1, rho=0.3, method=methods.GSAM(), backend=backend)
        for mode in modes:
            with torch.inference_mode(mode):
                w.grad = w.detach().square()
                with optimizer.perturb_by([torch.ones(4)]):
                    pass
                optimizer.first_step()
                w.grad = w.detach().square()
                optimizer.second_step()
        return [w]

    assert_all_close(train([True, False, True, False]), train([False] * 4))


def test_inference_mode_has_no_effect_on_statistics(backend):
    """AE-SAM's of the gradients' norm, and those that batch norm keeps."""

    def train(modes):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        schedule = schedules.AESAM(total_steps=9)
        optimizer = FastSAM(model.parameters(), lr=0.1, rho=0.3, schedule=schedule, model=model, backend=backend)
        x = torch.linspace(-1, 1, 24).reshape(8, 3)
        for mode in modes:
            model(x).square().sum().backward()
            with torch.inference_mode(mode):
                again = optimizer.first_step()
            if again:
                model(x).square().sum().backward()
            with torch.inference_mode(mode):
                optimizer.second_step(zero_grad=True)
        return [*model.parameters(), *model.buffers()]

    assert_all_close(train([True, False, True, False]), train([False] * 4))


def test_a_sparse_gradient_is_refused_and_forgotten(backend):
    """The steps after it are as those before it."""
    w = nn.Parameter(torch.linspace(0.5, 1.5, 4))
    optimizer = FastSAM([w], lr=0.1, backend=backend)

    def step(sparse):
        def closure():
            optimizer.zero_grad()
            w.grad = w.detach().square().to_sparse() if sparse else w.detach().square()

        optimizer.step(closure)

    step(False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
            step(True)
    step(False)


def test_parameters_made_in_inference_mode_are_refused_by_name(backend):
    with torch.inference_mode():
        w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"parameter 1 \(shape \(3,\)\): it is an inference tensor"):
        FastSAM([nn.Parameter(torch.ones(2)), w], lr=0.1, backend=backend)


def test_a_model_may_swap_its_tensors_beside_gradients(backend):
    """``torch.utils.swap_tensors`` refuses a gradient to which there is a weak reference."""
    model = nn.Linear(3, 2)
    optimizer = FastSAM(model.parameters(), lr=0.1, backend=backend)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)

            def closure():
                optimizer.zero_grad()
                model(torch.ones(4, 3, dtype=model.weight.dtype)).square().sum().backward()

            optimizer.step(closure)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight.dtype is torch.float64


def test_micro_batches_may_share_one_buffer(backend):
    w, buffer, values = nn.Parameter(torch.zeros(1)), torch.zeros(1), iter([1.0, 2.0, 3.0, 4.0])
    optimizer = FastSAM([w], lr=1.0, rho=0.1, backend=backend)

    def closure():
        buffer.fill_(next(values))
        w.grad = buffer

    optimizer.step(closures=[closure, closure])
    torch.testing.assert_close(w.detach(), torch.tensor([-3.0]))


@pytest.mark.parametrize("give", READ_ONLY, ids=lambda give: give.__name__)
def test_micro_batches_of_gradients_that_cannot_be_written_to(backend, give):
    def train(plain):
        params = [nn.Parameter(torch.linspace(0.5, 1.5, 4)), nn.Parameter(torch.linspace(2.0, 1.0, 4))]
        optimizer = FastSAM(params, lr=0.02, rho=0.3, momentum=0.9, backend=backend)

        def closure():
            give(params, params[0].detach().square() * params[1].detach() - 0.1)
            for param in params if plain else ():
                param.grad = param.grad.clone()

        for _ in range(3):
            optimizer.step(closures=[closure, closure])
        return params

    assert_all_close(train(False), train(True))


MEMORY = {
    "numpy": lambda array: torch.from_numpy(array),
    "frombuffer": lambda array: torch.frombuffer(array, dtype=torch.float32),
    "dlpack": lambda array: torch.from_dlpack(array),
}


@pytest.mark.parametrize("method", SHARING, ids=str)
@pytest.mark.parametrize("wrap", MEMORY.values(), ids=MEMORY)
def test_memory_that_torch_does_not_own_is_copied(backend, method, wrap):
    """Nothing refers to the gradient, and no version counter tells of writes to it."""

    def train(shared):
        w = nn.Parameter(torch.arange(1.0, 5.0))
        optimizer = FastSAM([w], lr=0.01, rho=0.5, method=method, backend=backend)
        array = torch.zeros(4).numpy()

        def closure():
            array[:] = w.detach().pow(3).numpy()
            w.grad = wrap(array) if shared else torch.tensor(array)

        for _ in range(3):
            optimizer.step(closure)
        return [w]

    assert_all_close(train(True), train(False))


@pytest.mark.parametrize("method", [methods.SAM(), methods.GSAM()], ids=str)
def test_a_flat_buffer_stays_the_gradients(backend, method):
    def train(is_flat):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = FastSAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, method=method, backend=backend)
        flat, at = torch.zeros(8), 0
        for param in model.parameters() if is_flat else ():
            param.grad = flat[at : at + param.numel()].view_as(param)
            at += param.numel()

        def closure():
            flat.zero_() if is_flat else optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            for buffer in [flat] if is_flat else [p.grad for p in model.parameters()]:
                buffer.mul_(0.5)

        for _ in range(3):
            optimizer.step(closure)
        return model.parameters()

    assert_all_close(train(True), train(False))


def test_first_pass_gradients_that_are_written_to_are_an_error(backend):
    w = nn.Parameter(torch.ones(3))
    optimizer = FastSAM([w], lr=0.1, method=methods.GSAM(), backend=backend)
    w.grad = torch.ones(3)
    optimizer.first_step()
    optimizer._engine.tables._tables[0].first_grads[0].add_(1)
    w.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="first-pass gradient was written to"):
        optimizer.second_step()
    optimizer.restore()
    assert torch.equal(w, torch.ones(3))
