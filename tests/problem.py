"""A small model with its data, and a picture of all that a refused or failed call must leave alone."""

import io

import torch
from checks import assert_same_bits
from registry import BASES as BASES
from registry import FUSED_BASES as FUSED_BASES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import FastSAM


class Stop(Exception):
    """What closures that fail raise."""


def raises(kind, act, *arguments):
    """Whether ``act`` raises such an exception."""
    try:
        act(*arguments)
    except kind:
        return True
    return False


def patched(patch, functions, wrap):
    """Replaces each ``(object, attribute)`` by ``wrap`` of what was there."""
    for owner, name in functions:
        patch.setattr(owner, name, wrap(getattr(owner, name)))


class Problem:
    """Two layers, and a batch that they are to fit. Two problems of one seed are the same."""

    def __init__(self, device, seed=1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(device)
            self.x, self.y = torch.randn(8, 4).to(device), torch.randn(8, 3).to(device)

    @property
    def params(self):
        return list(self.model.parameters())

    def optimizer(self, backend, base="sgd", **options):
        cls, base_options = BASES[base]
        return FastSAM(self.model.parameters(), cls, backend=backend, **{**base_options, **options})

    def base(self, base="sgd", **options):
        """The base optimizer alone, as torch has it: one tensor at a time."""
        cls, base_options = BASES[base]
        return cls(self.model.parameters(), foreach=False, **{**base_options, **options})

    def loss(self):
        return (self.model(self.x) - self.y).square().mean()

    def backward(self):
        loss = self.loss()
        loss.backward()
        return loss

    def closure(self, optimizer):
        def closure():
            optimizer.zero_grad()
            return self.backward()

        return closure

    def step(self, optimizer):
        return optimizer.step(self.closure(optimizer))

    def first_step(self, optimizer):
        """The first of the two phases, from gradients made anew."""
        optimizer.zero_grad()
        self.backward()
        optimizer.first_step()

    def two_phase(self, optimizer):
        self.first_step(optimizer)
        self.backward()
        optimizer.second_step()

    def plain_step(self, optimizer):
        """A step of an optimizer that is not SAM."""
        optimizer.zero_grad()
        self.backward()
        optimizer.step()

    def weights(self):
        return [p.detach().clone() for p in self.params]


class Matrices(Problem):
    """Without biases: Muon takes matrices only."""

    def __init__(self, device, seed=1):
        super().__init__(device, seed)
        for layer in (self.model[0], self.model[2]):
            layer.bias = None


class TwoDtypes(Problem):
    """A problem with two tables: the second layer and the batch's second half are in float64."""

    def __init__(self, device):
        super().__init__(device)
        self.model[2].double()

    def loss(self):
        return (self.model[2](self.model[1](self.model[0](self.x)).double()) - self.y).square().mean()


class WideGradients(Problem):
    """The first layer is in bfloat16 and has float32 gradients."""

    def __init__(self, device):
        super().__init__(device)
        self.model[0].bfloat16()

    def loss(self):
        return (self.model[2](self.model[1](self.model[0](self.x.bfloat16()).float())) - self.y).square().mean()

    def backward(self):
        loss = super().backward()
        for param in self.model[0].parameters():
            give_grad(param, param.grad.float())
        return loss


def give_grad(param, grad):
    """Assigns a gradient of any dtype, with every torch: only the assignment itself compares dtypes."""
    memory = param.data
    if grad.dtype != memory.dtype:
        param.data = torch.empty_like(memory, dtype=grad.dtype)
    param.grad = grad
    if grad.dtype != memory.dtype:
        param.data = memory


class Operators(TorchDispatchMode):
    """The operators that are run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Staging memory is the host's, and used again and again.
        self.names.append("staging" if kwargs.get("pin_memory") else str(func))
        return func(*args, **kwargs)


class Snapshot:
    """Weights and where they are, gradients, state, groups and ``perturbed``, as they are now."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.addresses = [p.data_ptr() for p in self.params]
        self.weights = [p.detach().clone() for p in self.params]
        self.grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        self.state = state_of(optimizer)
        self.groups = groups_of(optimizer)
        self.perturbed = optimizer.perturbed

    def assert_unchanged(self, *, grads=True):
        """Bit for bit (``grads`` False: but for the gradients, which a closure has made)."""
        optimizer = self.optimizer
        assert optimizer.perturbed is self.perturbed
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert [id(p) for p in params] == [id(p) for p in self.params]
        assert_same_bits([p.detach() for p in params], self.weights, "weights")
        assert [p.data_ptr() for p in params] == self.addresses
        if grads:
            assert_same_bits([p.grad for p in params], self.grads, "gradients")
        assert_same_state(state_of(optimizer), self.state)
        assert_same_items(groups_of(optimizer), self.groups, "groups")
        assert_one_with_its_base(optimizer)


def state_of(optimizer):
    """A copy of the state: one dict per parameter that has any."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    position = {p: i for i, p in enumerate(params)}
    return {
        position[p]: {name: value.clone() if isinstance(value, Tensor) else value for name, value in entries.items()}
        for p, entries in optimizer.state.items()
    }


def groups_of(optimizer):
    """A copy of the parameter groups' options."""
    return [
        {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in optimizer.param_groups
    ]


def assert_same_state(actual, expected):
    assert sorted(actual) == sorted(expected), "parameters with a state"
    for i in expected:
        assert_same_items([actual[i]], [expected[i]], f"state of parameter {i}")


def assert_same_items(actual, expected, what):
    assert len(actual) == len(expected), what
    for one, other in zip(actual, expected, strict=True):
        assert sorted(one) == sorted(other), what
        for name, value in other.items():
            if isinstance(value, Tensor):
                assert_same_bits(one[name], value, f"{what}: {name}")
            else:
                assert one[name] == value, f"{what}: {name}"


def assert_one_with_its_base(optimizer):
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state


def saved_and_loaded(optimizer):
    """The state_dict, through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)
