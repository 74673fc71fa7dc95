"""Models and loops as users build them, beside SAM written by hand."""

import pytest
import torch
from small_models import make_model
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fastsam import FastSAM

pytestmark = pytest.mark.parametrize("backend", ["reference", "foreach", "native"])

X = torch.linspace(-1, 1, 24, dtype=torch.float64).sin().reshape(8, 3)
Y = torch.linspace(1, -1, 16, dtype=torch.float64).cos().reshape(8, 2)


@pytest.fixture(autouse=True)
def in_float64():
    """All models, so that a difference is a fault and not rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class ByHand(torch.optim.SGD):
    """Foret et al., equation 2, in plain PyTorch, with the constant of FastSAM's denominator."""

    def __init__(self, params, rho, **options):
        super().__init__(params, **options)
        self.rho, self.kept = rho, None

    @torch.no_grad()
    def first_step(self):
        params = [param for group in self.param_groups for param in group["params"]]
        norm = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).double().norm()
        self.kept = [(param, param.clone()) for param in params]
        for param in params:
            if param.grad is not None:
                param.add_(param.grad * (self.rho / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for param, kept in self.kept:
            param.copy_(kept)
        self.kept = None
        super().step()

    @property
    def perturbed(self):
        return self.kept is not None

    def step(self, closure):
        closure()
        self.first_step()
        closure()
        self.second_step()


def loss_of(model):
    return nn.functional.mse_loss(model(X), Y)


def train(make, model, loss=loss_of, edit=lambda: None, optimizer=None):
    optimizer = optimizer or make(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)

    def closure():
        optimizer.zero_grad()
        loss(model).backward()
        edit()

    for _ in range(3):
        optimizer.step(closure)
    return list(model.parameters())


def functional_call(make):
    return train(
        make,
        make_model(),
        lambda m: nn.functional.mse_loss(torch.func.functional_call(m, dict(m.named_parameters()), X), Y),
    )


def reparametrized(parametrize):
    def run(make):
        model = make_model()
        parametrize(model[0])
        return train(make, model)

    return run


def checkpointed(reentrant):
    def run(make):
        x = X.clone().requires_grad_(reentrant)
        return train(make, make_model(), lambda m: nn.functional.mse_loss(checkpoint(m, x, use_reentrant=reentrant), Y))

    return run


def saved_on_the_cpu(make):
    def loss(model):
        with torch.autograd.graph.save_on_cpu():
            return loss_of(model)

    return train(make, make_model(), loss)


def quantisation_aware(make):
    """The observer of activations writes to its buffers in both passes, as it does by hand."""
    torch.manual_seed(0)
    observed = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    model = nn.Sequential(nn.Linear(3, 4), observed, nn.Tanh(), nn.Linear(4, 2))
    return [*train(make, model), *observed.buffers()]


def gradient_penalty(make):
    def loss(model):
        value = loss_of(model)
        grads = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        return value + 0.1 * sum(grad.square().sum() for grad in grads)

    return train(make, make_model(), loss)


def clipped_with_a_norm(make):
    model = make_model()

    def clip():
        norm = nn.utils.get_total_norm([param.grad for param in model.parameters()])
        nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, norm)

    return train(make, model, edit=clip)


def lazy(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
    return train(make, model, optimizer=make(model.parameters(), rho=0.1, lr=0.1, momentum=0.9))


def gradient_hooks(make):
    model = make_model()
    for param in model.parameters():
        param.register_hook(lambda grad: grad * 0.5)
    return train(make, model)


def an_optimizer_per_parameter(make):
    """Each steps in a hook, as soon as its gradient is there."""
    model = make_model()
    optimizers = {param: make([param], rho=0.1, lr=0.1, momentum=0.9) for param in model.parameters()}

    def step(param):
        optimizer = optimizers[param]
        optimizer.second_step() if optimizer.perturbed else optimizer.first_step()
        param.grad = None

    for param in optimizers:
        param.register_post_accumulate_grad_hook(step)
    for _ in range(6):
        loss_of(model).backward()
    return list(optimizers)


def two_models_with_a_layer_in_common(make):
    one, other = make_model(), make_model()
    other[0] = one[0]
    optimizers = [make(model.parameters(), rho=0.1, lr=0.1, momentum=0.9) for model in (one, other)]
    for _ in range(2):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            train(make, model, optimizer=optimizer)
    return [*one.parameters(), *other.parameters()]


def in_shared_memory(make):
    return train(make, make_model().share_memory())


def copied_on_write(make):
    """Lazy clones as snapshots must not see later weights."""
    model, snapshots = make_model(), []
    optimizer = make(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)

    def snap():
        if not optimizer.perturbed:
            snapshots.extend(torch._lazy_clone(param.detach()) for param in model.parameters())

    return [*train(make, model, edit=snap, optimizer=optimizer), *snapshots]


CASES = {
    "functional_call": functional_call,
    "spectral_norm": reparametrized(parametrizations.spectral_norm),
    "weight_norm": reparametrized(parametrizations.weight_norm),
    "orthogonal": reparametrized(parametrizations.orthogonal),
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
    "save_on_cpu": saved_on_the_cpu,
    "quantisation-aware training": quantisation_aware,
    "gradient penalty": gradient_penalty,
    "clip_grads_with_norm_": clipped_with_a_norm,
    "lazy modules": lazy,
    "gradient hooks": gradient_hooks,
    "an optimizer per parameter": an_optimizer_per_parameter,
    "shared layers": two_models_with_a_layer_in_common,
    "shared memory": in_shared_memory,
    "copy on write": copied_on_write,
}


@pytest.mark.parametrize("case", CASES)
def test_models_and_loops(backend, case):
    expected = CASES[case](ByHand)
    found = CASES[case](lambda params, **options: FastSAM(params, backend=backend, **options))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
