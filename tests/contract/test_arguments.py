"""Construction: what is accepted, what is refused and in which words, and which backend is chosen."""

import copy
import inspect
from fractions import Fraction

import numpy as np
import pytest
import torch
from checks import assert_same_bits, values
from problem import Problem
from torch import nn

import fastsam
from fastsam import FastSAM

pytestmark = pytest.mark.face


def make_params(device="cpu"):
    return [nn.Parameter(values((3, 2), torch.float32, device)), nn.Parameter(values((4,), torch.float32, device, 1))]


def perturbation_of(params, grads, optimizer):
    """How far each parameter is from where it was, between the two phases."""
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.first_step()
    moves = [(p.detach() - b).double() for p, b in zip(params, before, strict=True)]
    optimizer.restore()
    return moves


def norm(tensors):
    return float(torch.cat([t.double().flatten() for t in tensors]).norm())


# ---- what the package shows ----


def test_signature_is_documented_one():
    parameters = inspect.signature(FastSAM).parameters
    own = [
        "rho",
        "adaptive",
        "method",
        "interval",
        "schedule",
        "model",
        "replay_rng",
        "rounding",
        "rounding_seed",
        "master_weights",
        "shard_groups",
        "local_ascent",
        "backend",
    ]
    assert list(parameters) == ["params", "base", *own, "base_kwargs"]
    assert parameters["base"].default is torch.optim.SGD
    assert {name: parameters[name].default for name in ("rho", "adaptive", "model", "replay_rng", "backend")} == {
        "rho": 0.05,
        "adaptive": False,
        "model": None,
        "replay_rng": False,
        "backend": "auto",
    }
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(parameters)[2:-1])
    assert issubclass(FastSAM, torch.optim.Optimizer)
    assert set(fastsam.__all__) >= {"FastSAM", "BackendUnavailable", "__version__"}


def test_fresh_optimizer(backend, device):
    params = make_params(device)
    optimizer = FastSAM(params, torch.optim.AdamW, rho=0.2, lr=0.5, backend=backend)
    assert type(optimizer.base_optimizer) is torch.optim.AdamW
    assert optimizer.perturbed is False
    assert len(optimizer.state) == 0
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in ("rho", "adaptive", "perturb", "lr", "betas", "eps")} == {
        "rho": 0.2,
        "adaptive": False,
        "perturb": True,
        "lr": 0.5,
        "betas": (0.9, 0.999),
        "eps": 1e-8,  # the base's: the perturbation's own is fixed
    }
    assert all(mine is theirs for mine, theirs in zip(group["params"], params, strict=True))


@pytest.mark.parametrize(
    "form",
    [
        lambda p: p,
        tuple,
        iter,
        lambda p: (q for q in p),
        lambda p: dict(enumerate(p)).values(),
        lambda p: [{"params": p}],
        lambda p: [{"params": iter(p)}],
        lambda p: iter([{"params": p[0]}, {"params": p[1:]}]),
        lambda p: [("weight", p[0]), ("bias", p[1])],
    ],
    ids=["list", "tuple", "iterator", "generator", "values", "group", "group-iterator", "groups", "named"],
)
def test_params_as_torch_takes_them(form):
    params = make_params()
    mine = FastSAM(form(params), lr=0.1)
    theirs = torch.optim.SGD(form(params), lr=0.1)
    assert len(mine.param_groups) == len(theirs.param_groups)
    for ours, group in zip(mine.param_groups, theirs.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in group["params"]]
        assert {name: ours.get(name) for name in group if name != "params"} == {
            name: value for name, value in group.items() if name != "params"
        }


def test_callers_groups_are_not_written_to():
    first, second = make_params()
    groups = [{"params": first, "lr": 0.5}, {"params": iter([second])}]
    given = [dict(group) for group in groups]
    optimizer = FastSAM(groups, lr=0.1)
    optimizer.param_groups[0]["lr"] = 7.0
    assert groups == given


# ---- refused: parameters ----


def overlapping():
    return nn.Parameter(torch.zeros(10).as_strided((3, 3), (2, 1)))


def expanded():
    return torch.zeros(3, 1).expand(3, 4).requires_grad_()


BAD_PARAMS = {
    "empty-list": (lambda p: [], ValueError, "params is empty"),
    "empty-generator": (lambda p: (q for q in []), ValueError, "params is empty"),
    "number": (lambda p: 3, TypeError, "params must be an iterable .* got int"),
    "none": (lambda p: None, TypeError, "params must be an iterable .* got NoneType"),
    "tensor": (lambda p: p[0], TypeError, "params must be an iterable .* got Parameter"),
    "module": (lambda p: nn.Linear(2, 2), TypeError, "params must be an iterable .* got Linear"),
    "mapping": (lambda p: {"w": p[0]}, TypeError, "params must be an iterable .* got dict"),
    "text": (lambda p: "weights", TypeError, "parameter 0 must be a tensor, got str"),
    "number-inside": (lambda p: [p[0], 3.0], TypeError, "parameter 1 must be a tensor, got float"),
    "none-inside": (lambda p: [p[0], None], TypeError, "parameter 1 must be a tensor, got NoneType"),
    "group-after-tensor": (lambda p: [p[0], {"params": p[1]}], TypeError, "parameter 1 must be a tensor, got dict"),
    "tensor-after-group": (lambda p: [{"params": p[1]}, p[0]], TypeError, "parameter group must be a dict"),
    "group-without-params": (lambda p: [{"lr": 0.1}], TypeError, "parameter group must be a dict with 'params'"),
    "group-of-number": (lambda p: [{"params": 3}], TypeError, "params must be an iterable .* got int"),
    "set": (lambda p: [{"params": set(p)}], TypeError, "params must be in an order"),
    "twice": (lambda p: [*p, p[0]], ValueError, r"parameter 2 \(shape \(3, 2\)\) is parameter 0 again"),
    "twice-in-groups": (
        lambda p: [{"params": p}, {"params": [p[1]]}],
        ValueError,
        r"parameter 2 \(shape \(4,\)\) is parameter 1 again",
    ),
    "twice-named": (lambda p: [("a", p[1]), ("b", p[1])], ValueError, r"parameter 1 \(shape \(4,\)\) is parameter 0"),
    "some-names-missing": (lambda p: [("a", p[0]), p[1]], ValueError, "names"),
    "meta": (
        lambda p: [*p, nn.Parameter(torch.empty(5, device="meta"))],
        ValueError,
        r"parameter 2 \(shape \(5,\)\).*meta",
    ),
    "float8": (
        lambda p: [nn.Parameter(torch.zeros(5, dtype=torch.float8_e4m3fn))],
        ValueError,
        r"parameter 0 \(shape \(5,\)\): dtype torch.float8_e4m3fn",
    ),
    "expanded": (lambda p: [*p, expanded()], ValueError, r"parameter 2 \(shape \(3, 4\)\): its elements overlap"),
    "overlapping": (lambda p: [*p, overlapping()], ValueError, r"parameter 2 \(shape \(3, 3\)\): its elements overlap"),
    "sparse": (
        lambda p: [*p, torch.eye(3).to_sparse().requires_grad_()],
        ValueError,
        r"parameter 2 \(shape \(3, 3\)\): sparse parameters",
    ),
    "no-leaf": (lambda p: [p[0] * 2], ValueError, "non-leaf"),
}
# A group's "params" may be any of these; the others are no lists of parameters at all.
BAD_IN_A_GROUP = {
    name: BAD_PARAMS[name]
    for name in (
        *("number-inside", "none-inside", "twice", "twice-named", "some-names-missing", "meta"),
        *("float8", "expanded", "overlapping", "sparse", "no-leaf"),
    )
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_bad_params_are_refused(make, error, message):
    params = make_params()
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=message):
        FastSAM(make(params), lr=0.1)
    assert_same_bits([p.detach() for p in params], before)


@pytest.mark.parametrize(("make", "error", "message"), BAD_IN_A_GROUP.values(), ids=BAD_IN_A_GROUP)
def test_bad_params_are_refused_by_add_param_group(make, error, message):
    params = make_params()
    optimizer = FastSAM([nn.Parameter(torch.zeros(1))], lr=0.1)
    # Counted from the first of the optimizer's parameters, of which there is one already.
    for index in (2, 1, 0):
        message = message.replace(f"parameter {index}", f"parameter {index + 1}")
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": make(params)})
    assert len(optimizer.param_groups) == 1
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups


def test_lazy_parameters_may_come_before_their_shapes(backend, device):
    """As for torch.optim: what they are is known when the first gradients are there."""
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)).to(device)
    optimizer = FastSAM(model.parameters(), lr=0.1, momentum=0.9, backend=backend)
    x = values((5, 4), torch.float32, device)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert len(optimizer.state) == 4


# ---- refused: options ----

BAD_RHO = {
    "negative": (-0.1, ValueError, "rho must be .*>= 0, got -0.1"),
    "nan": (float("nan"), ValueError, "rho must be .*got nan"),
    "inf": (float("inf"), ValueError, "rho must be .*got inf"),
    "text": ("0.05", TypeError, "rho must be a number .* got str"),
    "none": (None, TypeError, "rho must be a number .* got NoneType"),
    "complex": (1j, TypeError, "rho must be a number .* got complex"),
    "list": ([0.1], TypeError, "rho must be a number .* got list"),
    "negative-tensor": (torch.tensor(-0.1), ValueError, "rho must be .*>= 0"),
    "nan-tensor": (torch.tensor(float("nan")), ValueError, "rho must be .*got nan"),
    "two-elements": (torch.ones(2), ValueError, r"rho must be .*one element, got shape \(2,\)"),
}


# Where an option can be given.
def as_argument(base=torch.optim.SGD, **option):
    FastSAM(make_params(), base, lr=0.1, **option)


def in_a_group(base=torch.optim.SGD, **option):
    FastSAM([{"params": make_params(), **option}], base, lr=0.1)


def in_an_added_group(base=torch.optim.SGD, **option):
    optimizer = FastSAM(make_params(), base, lr=0.1)
    try:
        optimizer.add_param_group({"params": make_params(), **option})
    finally:
        assert len(optimizer.param_groups) == 1


everywhere = pytest.mark.parametrize(
    "give", [as_argument, in_a_group, in_an_added_group], ids=["argument", "group", "added"]
)


@pytest.mark.parametrize(("rho", "error", "message"), BAD_RHO.values(), ids=BAD_RHO)
@everywhere
def test_bad_rho_is_refused(rho, error, message, give):
    with pytest.raises(error, match=message):
        give(rho=rho)


@pytest.mark.parametrize("rho", [np.float32(0.25), np.int64(1), Fraction(1, 4), 1], ids=lambda rho: type(rho).__name__)
def test_any_real_number_is_rho(rho):
    for optimizer in (
        FastSAM(make_params(), lr=0.1, rho=rho),
        FastSAM([{"params": make_params(), "rho": rho}], lr=0.1),
    ):
        (group,) = optimizer.param_groups
        assert type(group["rho"]) is float
        assert group["rho"] == rho


@everywhere
def test_adaptive_must_be_bool(give):
    with pytest.raises(TypeError, match="adaptive must be True or False, got 'yes'"):
        give(adaptive="yes")


@pytest.mark.parametrize("give", [in_a_group, in_an_added_group], ids=["group", "added"])
def test_perturb_must_be_bool(give):
    with pytest.raises(TypeError, match="perturb must be True or False, got 1"):
        give(perturb=1)


class NeedsClosure(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure):
        return closure()


BAD_BASES = {
    "instance": (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), "base must be a class .* instance of SGD"),
    "function": (lambda params: torch.optim.SGD(params), "base must be a torch.optim.Optimizer class, got <function"),
    "text": ("SGD", "base must be a torch.optim.Optimizer class, got 'SGD'"),
    "none": (None, "base must be a torch.optim.Optimizer class, got None"),
    "other-class": (nn.Linear, "base must be a torch.optim.Optimizer class, got <class .*Linear"),
    "lbfgs": (torch.optim.LBFGS, "base LBFGS is not supported: .* closure"),
    "needs-closure": (NeedsClosure, "base NeedsClosure is not supported: .* closure"),
    "adadelta": (torch.optim.Adadelta, "base Adadelta is not supported: its option 'rho'"),
    "sparse-adam": (torch.optim.SparseAdam, "base SparseAdam is not supported: .* sparse gradients"),
    "fastsam": (FastSAM, "base FastSAM is not supported"),
}


@pytest.mark.parametrize(("base", "message"), BAD_BASES.values(), ids=BAD_BASES)
def test_bad_bases_are_refused(base, message):
    with pytest.raises(TypeError, match=message):
        FastSAM(make_params(), base, lr=0.1)


def test_errors_about_base_options_are_the_bases():
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentom'"):
        FastSAM(make_params(), lr=0.1, momentom=0.9)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        FastSAM(make_params(), lr=-1)
    with pytest.raises(ValueError, match="Nesterov momentum requires"):
        FastSAM(make_params(), lr=0.1, nesterov=True)


@everywhere
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop], ids=lambda b: b.__name__)
def test_differentiable_is_refused(base, give):
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        give(base, differentiable=True)


def test_model_must_be_module():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        FastSAM(make_params(), lr=0.1, model=make_params())


# ---- accepted options ----


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (base, {name: value})
        for base, names in (("sgd", ["foreach", "fused"]), ("adamw", ["foreach", "fused", "capturable"]))
        for name in names
        for value in (True, False)
    ],
    ids=str,
)
def test_implementation_options_have_no_effect(backend, device, base, options):
    plain, other = Problem(device), Problem(device)
    one, two = plain.optimizer(backend, base), other.optimizer(backend, base, **options)
    assert all(two.param_groups[0][name] is value for name, value in options.items())
    for _ in range(3):
        plain.step(one)
        other.step(two)
    assert_same_bits(other.weights(), plain.weights())


@pytest.mark.parametrize(
    "rho", [0.5, torch.tensor(0.5), torch.tensor([0.5]), 1], ids=["float", "0-dim", "1-element", "int"]
)
def test_rho_is_length_of_perturbation(backend, device, rho):
    params = make_params(device)
    grads = [values(p.shape, torch.float32, device, seed=5) for p in params]
    moves = perturbation_of(params, grads, FastSAM(params, rho=rho, lr=0.1, backend=backend))
    assert norm(moves) == pytest.approx(float(rho), rel=1e-5)


def test_no_group_is_perturbed(backend, device):
    problem, alone = Problem(device), Problem(device)
    optimizer = FastSAM([{"params": problem.params, "perturb": False}], lr=0.1, momentum=0.9, backend=backend)
    base = alone.base("sgd")
    for _ in range(3):
        problem.step(optimizer)
        alone.plain_step(base)
    torch.testing.assert_close(problem.weights(), alone.weights(), rtol=1e-6, atol=1e-7)


def test_refusals_leave_callers_groups_alone():
    first, second = make_params()
    groups = [{"params": [first], "lr": 0.5}, {"params": [second], "rho": -1.0}]
    given = copy.copy(groups[0]), copy.copy(groups[1])
    with pytest.raises(ValueError, match="rho"):
        FastSAM(groups, lr=0.1)
    assert (groups[0], groups[1]) == given
