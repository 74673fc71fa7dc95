"""rho = 0 is torch.optim: seven steps beside its for-loop, parameters and state, through ``step(closure)``.

On ``reference`` the bits are torch.optim's in float32 and float64. Elsewhere every step starts from identical state
and stays within the design's tolerance; float16 and bfloat16 beside torch.optim on float32 copies.
"""

import copy
import itertools

import pytest
import torch
import triton_interpreter
from checks import Canaries, arithmetic, as_real, assert_same_bits, assert_within, has_torchs_bits, values
from registry import every_dtype
from torch import nn

from fastsam import FastSAM

STEPS = 7


def _combinations(**options):
    for chosen in itertools.product(*options.values()):
        yield dict(zip(options, chosen, strict=True))


def _count_of(options):
    return sum(map(bool, options.values()))


def _sgd_cases():
    momenta = [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
    ]
    rests = _combinations(weight_decay=[0.0, 0.02], maximize=[False, True])
    for (i, momentum), rest in itertools.product(enumerate(momenta), rests):
        yield torch.optim.SGD, {**momentum, **rest}, _count_of(rest) + i


def _adam_cases():
    shared = list(_combinations(amsgrad=[False, True], maximize=[False, True], weight_decay=[0.0, 0.02]))
    yield from ((torch.optim.Adam, options, _count_of(options)) for options in shared)
    yield from ((torch.optim.AdamW, options, _count_of(options) + 1) for options in shared)
    yield torch.optim.Adam, {"betas": (0.5, 0.9), "eps": 1e-2}, 0
    yield torch.optim.Adam, {"betas": (0.0, 0.99), "eps": 1e-4, "amsgrad": True}, 0
    yield torch.optim.Adam, {"weight_decay": 0.02, "decoupled_weight_decay": True}, 0


def _name(base, options):
    chosen = [name if value is True else f"{name}={value}" for name, value in options.items() if value]
    return "-".join([base.__name__, *chosen])


CASES = {_name(base, options): (base, options) for base, options, _ in [*_sgd_cases(), *_adam_cases()]}
# Those with an even count have every pair of two options' values.
EVERY_CASE = [
    pytest.param(_name(base, options), marks=[pytest.mark.thorough] if count % 2 else [])
    for base, options, count in [*_sgd_cases(), *_adam_cases()]
]
some_cases = pytest.mark.parametrize(
    ("base", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.02}),
        (torch.optim.AdamW, {"amsgrad": True}),
    ],
    ids=["SGD", "AdamW"],
)


class Twins:
    """A FastSAM with rho = 0 and the torch.optim class that it is to be, over copies of the same parameters."""

    def __init__(self, backend, base, groups, **options):
        self.groups = groups
        self.params = [p for group in groups for p in group["params"]]
        dtype = arithmetic(torch.float32) if self.params[0].dtype.itemsize == 2 else None
        self.copies = [_copy(p, dtype) for p in self.params]
        copies = iter(self.copies)
        twin_groups = [{**group, "params": [next(copies) for _ in group["params"]]} for group in groups]
        self.fast = FastSAM(groups, base, rho=torch.tensor(0.0), backend=backend, **options)
        self.torch = base(twin_groups, foreach=False, fused=False, **options)
        self.device = self.params[0].device
        self.exact = has_torchs_bits(backend, self.device) and dtype is None

    def step(self, grads):
        """One step of both with ``grads`` (None: that parameter has none), and everything compared."""
        starts = [c.detach().clone() for c in self.copies]
        states = {c: copy.deepcopy(self.torch.state.get(c, {})) for c in self.copies}
        addresses = [p.data_ptr() for p in self.params]

        def closure():
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = None if grad is None else _laid_out_anew(grad)

        self.fast.step(closure)
        for one, grad in zip(self.copies, grads, strict=True):
            one.grad = None if grad is None else grad.to(one.dtype)
        self.torch.step()
        self.compare(starts, states, grads)
        assert [p.data_ptr() for p in self.params] == addresses

    def compare(self, starts, states, grads):
        for i, (param, one, grad) in enumerate(zip(self.params, self.copies, grads, strict=True)):
            self.assert_equal(param.detach(), one.detach(), starts[i], f"parameter {i}")
            ours = {name: t for name, t in self.fast.state.get(param, {}).items() if not name.startswith("fastsam_")}
            theirs = self.torch.state.get(one, {})
            assert ours.keys() == theirs.keys(), f"state of parameter {i}"
            for name, expected in theirs.items():
                assert ours[name].shape == expected.shape, (i, name)
                if name == "step":
                    assert_same_bits(ours[name], expected, f"step of parameter {i}")
                    continue
                assert ours[name].dtype == param.dtype, (i, name)
                start = states[one].get(name, torch.zeros_like(expected))
                self.assert_equal(ours[name], expected, start, f"{name} of parameter {i}", _term(name, grad))
                # The next step starts from identical state.
                with torch.no_grad():
                    expected.copy_(ours[name])
            with torch.no_grad():
                one.copy_(param)

    def assert_equal(self, actual, expected, start, what, term=None):
        # torch.optim computes with complex numbers, FastSAM with pairs of reals.
        if self.exact and not actual.is_complex():
            assert_same_bits(actual, expected, what)
        else:
            assert_within(actual, expected, start, what, term)

    def set_option(self, **options):
        for group in (*self.fast.param_groups, *self.torch.param_groups):
            group.update(options)


def _term(name, grad):
    """What a state is a sum of, beside what it was."""
    if grad is None or "sq" not in name:
        return grad
    return as_real(grad).square()


def _copy(param, dtype):
    """A leaf with the same elements at the same strides, so that torch.optim does the same operations."""
    one = torch.empty_strided(param.shape, param.stride(), dtype=dtype or param.dtype, device=param.device)
    return one.copy_(param.detach()).requires_grad_()


def _laid_out_anew(grad):
    """A gradient with the strides of ``grad`` in memory of its own, as autograd gives anew in every pass."""
    if 0 in grad.stride():
        return grad.clone().as_strided((1,), (1,)).expand(grad.shape)
    return torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)


def make_zoo(dtype, device):
    """Parameters of every kind, in two groups, and the canaries around them."""
    canaries = Canaries()
    shapes = [(0,), (5, 7), (4, 3, 2, 2), (4, 3, 3, 2), (6, 5), (1025,), (11,), (33,), (0, 3)]
    shapes += [(0,), (17,), (0, 2), (3, 4, 5), (7,), ()]
    params = [values(shape, dtype, device, seed) for seed, shape in enumerate(shapes)]
    params[2] = params[2].to(memory_format=torch.channels_last)
    params = [canaries.around(p, offset=i % 2) for i, p in enumerate(params)]
    params[4] = canaries.around(params[4], strides=(14, 2))  # every second column of a larger matrix, and padding
    params[12] = canaries.around(params[12], strides=(41, 1, 8), offset=1)
    if dtype.itemsize >= 4:
        params[10:10] = [canaries.around(values(shape, dtype.to_complex(), device, 50)) for shape in [(3, 3), ()]]
    params = [p.requires_grad_() for p in params]
    return params[:9], params[9:], canaries


FROZEN, LATE = (1, 3, 10), (5, 7)


def zoo_grads(params, step):
    """Gradients of every layout; none at step 2, for some none at 3 and 4, for some the first one at 4."""
    if step == 2:
        return [None] * len(params)
    grads = []
    for i, param in enumerate(params):
        if (i in FROZEN and step in (3, 4)) or (i in LATE and step < 4):
            grads.append(None)
            continue
        grad = values(param.shape, param.dtype, param.device, 100 * step + i)
        if i == 7:
            grad = grad[:1].expand(param.shape)
        elif i % 3 == 0 and grad.dim() == 4:
            grad = grad.to(memory_format=torch.channels_last)
        elif grad.dim() >= 2 and i != 2:
            grad = (
                torch.empty(param.shape[::-1], dtype=param.dtype, device=param.device)
                .permute(*reversed(range(param.dim())))
                .copy_(grad)
            )
        grads.append(grad)
    return grads


@pytest.mark.parametrize("case", EVERY_CASE)
@every_dtype
def test_odd_parameters(backend, device, dtype, case):
    base, options = CASES[case]
    first, second, canaries = make_zoo(dtype, device)
    twins = Twins(
        backend,
        base,
        [{"params": first}, {"params": second, "lr": 0.003, "weight_decay": 0.03}],
        lr=0.01,
        **options,
    )
    # In float32 of every kind: the first gradients, none, some, new ones, and all after that.
    steps = triton_interpreter.fewer(STEPS, 5 if dtype == torch.float32 else 3, backend, device)
    for step in range(1, steps + 1):
        if step == 4:
            twins.fast.param_groups[0]["lr"] = twins.torch.param_groups[0]["lr"] = 0.02
        twins.step(zoo_grads(twins.params, step))
        canaries.assert_alive()


def test_odd_parameters_cover_every_kind(device):
    """The parity tests are worth what is in their parameters and gradients."""
    first, second, _ = make_zoo(torch.float32, device)
    params = [*first, *second]
    assert [group[i].numel() for group in (first, second) for i in (0, -1)] == [0, 0, 0, 1]
    assert params[-1].dim() == 0
    assert any(p.numel() == 0 for p in second)
    assert sum(not p.is_contiguous() for p in params) == 3
    assert any(p.data_ptr() % 16 for p in params)
    assert any(p.is_complex() for p in params)
    grads = zoo_grads(params, 7)
    assert any(0 in g.stride() for g in grads if g.numel() > 1)
    assert sum(g.stride() != p.stride() for g, p in zip(grads, params, strict=True)) >= 6
    assert all(g is None for g in zoo_grads(params, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@some_cases
def test_lr_as_tensor(backend, device, dtype, base, options):
    """Changed in place between steps, as schedulers do."""
    params = [values((1025,), dtype, device, 1).requires_grad_(), values((3,), dtype, device, 2).requires_grad_()]
    lr = torch.tensor(0.01, dtype=torch.float64)
    twins = Twins(backend, base, [{"params": params}], lr=lr, **options)
    for step in range(1, 5):
        lr.fill_(0.01 * step)
        twins.step([values(p.shape, dtype, device, 10 * step + i) for i, p in enumerate(params)])
    assert twins.fast.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_betas_as_tensors(backend, device, dtype):
    # Exact in every dtype: torch.optim rounds some of what it computes from tensors to the parameter's.
    betas = tuple(torch.tensor(beta, dtype=torch.float64) for beta in (0.875, 0.984375))
    params = [values((1025,), dtype, device, 1).requires_grad_(), values((3,), dtype, device, 2).requires_grad_()]
    twins = Twins(backend, torch.optim.Adam, [{"params": params}], lr=0.01, betas=betas)
    for step in range(1, 5):
        twins.step([values(p.shape, dtype, device, 10 * step + i) for i, p in enumerate(params)])


@some_cases
def test_options_switched_on_and_off(backend, device, base, options):
    """Momentum, dampening and amsgrad may be set between steps; state that there is stays."""
    params = [values(shape, torch.float64, device, 1).requires_grad_() for shape in ((50,), ())]
    twins = Twins(backend, base, [{"params": params}], lr=0.01, **options)
    switches = {
        torch.optim.SGD: [
            {"dampening": 0.0},
            {"nesterov": True},
            {"nesterov": False, "dampening": 0.3},
            {"momentum": 0.0},
            {"momentum": 0.7},
            {"maximize": True},
        ],
        torch.optim.AdamW: [{"amsgrad": False}, {"maximize": True}, {"betas": (0.8, 0.9)}, {"eps": 0.1}],
    }[base]
    for step, switch in enumerate([{}, *switches, {}]):
        twins.set_option(**switch)
        twins.step([values(p.shape, p.dtype, device, 10 * step + i) for i, p in enumerate(params)])


@some_cases
@every_dtype
def test_training_moves_over_from_torch_and_back(backend, device, dtype, base, options):
    """torch.optim's checkpoint goes on in FastSAM, and FastSAM's in torch.optim."""
    params = [values(shape, dtype, device, i).requires_grad_() for i, shape in enumerate([(40,), (6, 7), ()])]
    before = base(params, lr=0.01, foreach=False, **options)
    for step in range(2):
        for i, param in enumerate(params[:2]):
            param.grad = values(param.shape, dtype, device, 100 + 10 * step + i)
        before.step()
    twins = Twins(backend, base, [{"params": params}], lr=0.5, **options)
    twins.fast.load_state_dict(copy.deepcopy(before.state_dict()))
    twins.torch.load_state_dict(copy.deepcopy(before.state_dict()))
    twins.set_option(foreach=False)
    assert twins.fast.param_groups[0]["lr"] == 0.01
    for step in range(3):
        twins.step([values(p.shape, dtype, device, 200 + 10 * step + i) for i, p in enumerate(params)])
    after = base(params, lr=0.5, foreach=False, **options)
    after.load_state_dict(copy.deepcopy(twins.fast.state_dict()))
    starts = [p.detach().clone() for p in params]
    for i, (param, one) in enumerate(zip(params, twins.copies, strict=True)):
        param.grad = values(param.shape, dtype, device, 300 + i)
        one.grad = param.grad.to(one.dtype)
    after.step()
    twins.torch.step()
    if dtype.itemsize >= 4:
        assert_within([p.detach() for p in params], [c.detach() for c in twins.copies], starts)
    else:  # torch.optim itself rounds after every operation there
        for param, one in zip(params, twins.copies, strict=True):
            torch.testing.assert_close(param.float(), one, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
def test_checkpoint_of_torch_loaded_in_mid_run(backend, device, base):
    """It counts for parameters that have had no step here yet, too."""
    options = {"momentum": 0.9, "dampening": 0.5} if base is torch.optim.SGD else {}
    params = [values((20,), torch.float32, device, i).requires_grad_() for i in range(2)]
    twins = Twins(backend, base, [{"params": params}], lr=0.01, **options)
    twins.step([values((20,), torch.float32, device, 5), None])
    other = base([values((20,), torch.float32, device, i) for i in range(2)], lr=0.01, foreach=False, **options)
    for step in range(3):
        for i, param in enumerate(other.param_groups[0]["params"]):
            param.grad = values((20,), torch.float32, device, 30 + 10 * step + i)
        other.step()
    twins.fast.load_state_dict(copy.deepcopy(other.state_dict()))
    twins.torch.load_state_dict(copy.deepcopy(other.state_dict()))
    for step in range(2):
        twins.step([values((20,), torch.float32, device, 60 + 10 * step + i) for i in range(2)])


# ---- models ----


def make_model(device):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 5)
    )
    return model.to(device, torch.float64)


def model_grads(model, step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator).to(next(model.parameters()).device)
    model.zero_grad()
    model(inputs.contiguous(memory_format=torch.channels_last)).square().mean().backward()
    return [p.grad.clone(memory_format=torch.preserve_format) for p in model.parameters()]


@some_cases
@pytest.mark.parametrize("checkpoint", [False, True], ids=["from-scratch", "contiguous-checkpoint"])
def test_channels_last_models(backend, device, base, options, checkpoint):
    model = make_model(device)
    loaded = None
    if checkpoint:
        trained = base(model.parameters(), lr=0.01, foreach=False, **options)
        for step in range(2):
            for param, grad in zip(model.parameters(), model_grads(model, 50 + step), strict=True):
                param.grad = grad
            trained.step()
        loaded = copy.deepcopy(trained.state_dict())
    weights = [p.detach().contiguous().clone() for p in model.parameters()]
    model = model.to(memory_format=torch.channels_last)
    if checkpoint:
        with torch.no_grad():
            for param, weight in zip(model.parameters(), weights, strict=True):
                param.copy_(weight)
    params = list(model.parameters())
    assert not params[0].is_contiguous()
    twins = Twins(backend, base, [{"params": params}], lr=0.01, **options)
    if loaded is not None:
        assert all(t.is_contiguous() for entries in loaded["state"].values() for t in entries.values())
        twins.fast.load_state_dict(copy.deepcopy(loaded))
        twins.torch.load_state_dict(copy.deepcopy(loaded))
    for step in range(STEPS):
        twins.step(model_grads(model, step))


@some_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_that_come_and_go(backend, device, dtype, base, options):
    """Gradients come and go in another pattern every step, as in a mixture of experts."""
    params = [values((20 + i,), dtype, device, i).requires_grad_() for i in range(12)]
    twins = Twins(backend, base, [{"params": params[:5]}, {"params": params[5:], "lr": 0.02}], lr=0.01, **options)
    generator = torch.Generator().manual_seed(3)
    for step in range(15):
        chosen = torch.rand(12, generator=generator) < 0.5
        grads = [values(p.shape, dtype, device, 100 * step + i) for i, p in enumerate(params)]
        twins.step([grad if chosen[i] else None for i, grad in enumerate(grads)])
