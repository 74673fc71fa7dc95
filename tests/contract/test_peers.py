"""What other packages test of their SAM optimizers, asked of FastSAM's methods: two phases, closures, options, errors.

The cases are those of pytorch_optimizer's own tests of SAM, GSAM, WSAM, LookSAM and FriendlySAM.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastsam import FastSAM, davda54, methods

pytestmark = pytest.mark.parametrize("backend", ["reference", "foreach", "native"])

X = torch.linspace(-3, 3, 80).reshape(40, 2).sin()
Y = (X.sum(dim=1, keepdim=True) > 0).float()


def make_model():
    torch.manual_seed(42)
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))


def loss_of(model):
    return nn.functional.binary_cross_entropy_with_logits(model(X), Y)


def closure_of(optimizer, model):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return closure


def train_in_two_phases(optimizer, model, steps):
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        losses.append(float(loss.detach()))
        loss.backward()
        if optimizer.first_step(zero_grad=True):
            loss_of(model).backward()
        optimizer.second_step(zero_grad=True)
    return losses


def train_by_closure(optimizer, model, steps):
    return [float(optimizer.step(closure_of(optimizer, model)).detach()) for _ in range(steps)]


def train_as_davda54(optimizer, model, steps):
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step(lambda: loss_of(model).backward())
        optimizer.zero_grad()
    return losses


WAYS = {"two phases": train_in_two_phases, "closure": train_by_closure}
ADAPTIVE = pytest.mark.parametrize("adaptive", [False, True])
CASES = {
    "SAM": methods.SAM(),
    "GSAM": methods.GSAM(),
    "WSAM": methods.WSAM(),
    "WSAM coupled": methods.WSAM(decouple=False),
    "LookSAM": methods.LookSAM(),
    "LookSAM k=2": methods.LookSAM(k=2),
}
BASES = {"adamw": (torch.optim.AdamW, 0.1), "nadam": (torch.optim.NAdam, 0.1), "asgd": (torch.optim.ASGD, 1.0)}


@ADAPTIVE
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", CASES)
def test_the_loss_halves(backend, name, base, way, adaptive):
    model, (cls, lr) = make_model(), BASES[base]
    method = CASES[name]
    optimizer = FastSAM(model.parameters(), cls, rho=0.05, adaptive=adaptive, method=method, lr=lr, backend=backend)
    losses = WAYS[way](optimizer, model, 20)
    assert losses[0] > 2 * losses[-1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
def test_friendly_sam_halves_the_loss(backend, base, way):
    model, (cls, lr) = make_model(), BASES[base]
    optimizer = FastSAM(model.parameters(), cls, method=methods.FriendlySAM(), lr=lr, backend=backend)
    losses = WAYS[way](optimizer, model, 20)
    assert losses[0] > 2 * losses[-1]


@ADAPTIVE
def test_a_closure_for_the_second_pass_alone(backend, adaptive):
    model = make_model()
    optimizer = davda54.SAM(model.parameters(), torch.optim.AdamW, adaptive=adaptive, lr=0.1, backend=backend)
    losses = train_as_davda54(optimizer, model, 20)
    assert losses[0] > 2 * losses[-1]


@pytest.mark.parametrize("name", CASES)
def test_both_ways_are_the_same_training(backend, name):
    trained = []
    for train in WAYS.values():
        model = make_model()
        optimizer = FastSAM(model.parameters(), torch.optim.AdamW, method=CASES[name], lr=0.1, backend=backend)
        train(optimizer, model, 4)
        trained.append([p.detach() for p in model.parameters()])
    for one, other in zip(*trained, strict=True):
        assert torch.equal(one, other)


@ADAPTIVE
def test_gsam_with_a_radius_that_follows_the_learning_rate(backend, adaptive):
    model = make_model()
    schedule = methods.RhoByLR(rho_max=0.05, lr_max=0.1)
    optimizer = FastSAM(
        model.parameters(),
        torch.optim.AdamW,
        rho=schedule,
        adaptive=adaptive,
        method=methods.GSAM(),
        lr=0.1,
        model=model,
        backend=backend,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25)
    losses = []
    for _ in range(20):
        losses += train_by_closure(optimizer, model, 1)
        scheduler.step()
    assert losses[0] > 2 * losses[-1]


def test_clipping_between_the_passes(backend):
    model = make_model()
    optimizer = FastSAM(model.parameters(), torch.optim.AdamW, method=methods.WSAM(), lr=0.1, backend=backend)

    def closure():
        loss = closure_of(optimizer, model)()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert float(nn.utils.get_total_norm([p.grad for p in model.parameters()])) < 0.1001
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert losses[0] > 2 * losses[-1]


WRONG = {
    "rho": (lambda **o: FastSAM(make_model().parameters(), rho=-1.0, lr=0.1, **o), "rho must be finite and >= 0"),
    "k": (lambda **o: methods.LookSAM(k=0), "k must be a whole number >= 1"),
    "alpha": (lambda **o: methods.GSAM(alpha=-1.0), "alpha must be"),
    "gamma": (lambda **o: methods.WSAM(gamma=1.0), "gamma must be in"),
    "sigma": (lambda **o: methods.FriendlySAM(sigma=-1.0), "sigma must be"),
    "lmbda": (lambda **o: methods.FriendlySAM(lmbda=1.5), "lmbda must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_out_of_range_are_named(backend, name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make(backend=backend)


def test_neither_a_closure_nor_an_ascent_is_an_error(backend):
    optimizer = FastSAM(make_model().parameters(), lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()


def test_a_base_must_be_a_class(backend):
    model = make_model()
    with pytest.raises(TypeError, match="base must be a class"):
        FastSAM(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1), backend=backend)


def test_sparse_gradients_are_refused(backend):
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = FastSAM(model.parameters(), lr=0.1, backend=backend)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        optimizer.first_step()


def test_without_any_gradient_nothing_happens(backend):
    model = make_model()
    before = copy.deepcopy(model)
    optimizer = FastSAM(model.parameters(), torch.optim.AdamW, lr=0.1, backend=backend)
    optimizer.step(lambda: None)
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_and_copies_go_on_alike(backend, name):
    model = make_model()
    optimizer = FastSAM(model.parameters(), torch.optim.AdamW, method=CASES[name], lr=0.1, backend=backend)
    train_by_closure(optimizer, model, 3)
    twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
    loaded_model = copy.deepcopy(model)
    loaded = FastSAM(loaded_model.parameters(), torch.optim.AdamW, method=CASES[name], lr=0.1, backend=backend)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert type(optimizer).__name__ in repr(optimizer)
    for mine, its_model in ((optimizer, model), (copied, twin), (loaded, loaded_model)):
        train_by_closure(mine, its_model, 3)
    for params in zip(model.parameters(), twin.parameters(), loaded_model.parameters(), strict=True):
        assert torch.equal(params[0], params[1])
        assert torch.equal(params[0], params[2])


def test_a_group_that_is_added_is_trained(backend):
    model = make_model()
    optimizer = FastSAM(model[0].parameters(), torch.optim.AdamW, lr=0.1, backend=backend)
    optimizer.add_param_group({"params": list(model[2].parameters()), "rho": 0.1})
    before = copy.deepcopy(model)
    train_in_two_phases(optimizer, model, 2)
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(one, other)
