"""Functional SAM's and ESAM's second passes, beside their papers' formulas in float64."""

from types import SimpleNamespace

import oracle
import pytest
import torch
from torch import nn
from torch.func import functional_call, vjp
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from trajectory import assert_same_trajectory, detached

from fastsam import FastSAM, functional_sam_closures, methods, schedules
from fastsam.closures import esam_closures

VOCABULARY, LENGTH, BATCH, LR, RHO = 7, 4, 3, 0.1, 0.2

pytestmark = [pytest.mark.face, pytest.mark.usefixtures("one_thread")]


class LanguageModel(nn.Module):
    """Hugging Face's interface of a causal model: labels with the batch, logits of shape (B, T, V) and a loss."""

    def __init__(self, dropout=0.0, checkpointed=False):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.hidden = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(6, VOCABULARY)
        self.checkpointed = checkpointed

    def forward(self, input_ids, labels=None):
        x = self.embedding(input_ids)
        x = checkpoint(self.hidden, x, use_reentrant=False) if self.checkpointed else self.hidden(x)
        logits = self.head(x)
        return SimpleNamespace(logits=logits, loss=None if labels is None else causal_loss(logits, labels))


def causal_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def make_model(device, **options):
    torch.manual_seed(1)
    return LanguageModel(**options).double().to(device)


def make_batches(device, count=1):
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(count):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator).to(device)
        labels = tokens.clone()
        labels[0, 2:] = -100  # padding
        batches.append({"input_ids": tokens, "labels": labels})
    return batches


def functional_gradient(model, batches):
    """Singh et al. 2025: J_F(w + rho g / ||g||)^T dL/dF(w), with g the gradient of L at w."""
    names = [name for name, _ in model.named_parameters()]
    at = tuple(p.detach().clone() for p in model.parameters())

    def logits_of(weights, batch):
        return functional_call(model, dict(zip(names, weights, strict=True)), (batch["input_ids"],)).logits

    g, by_logits = [torch.zeros_like(w) for w in at], []
    for batch in batches:
        logits, back = vjp(lambda *weights, batch=batch: logits_of(weights, batch), *at)
        held = logits.detach().requires_grad_()
        (by_logit,) = torch.autograd.grad(causal_loss(held, batch["labels"]) / len(batches), held)
        by_logits.append(by_logit)
        g = [a + b for a, b in zip(g, back(by_logit), strict=True)]
    size = oracle.length(g)
    above = tuple(w + RHO * x / size for w, x in zip(at, g, strict=True))
    result = [torch.zeros_like(w) for w in at]
    for batch, by_logit in zip(batches, by_logits, strict=True):
        back = vjp(lambda *weights, batch=batch: logits_of(weights, batch), *above)[1]
        result = [a + b for a, b in zip(result, back(by_logit), strict=True)]
    return at, g, result


def take_step(model, batches, loss_fn=None, **options):
    optimizer = FastSAM(model.parameters(), rho=RHO, lr=LR, **options)
    closure, ascent_closure = functional_sam_closures(model, loss_fn, *batches)
    return optimizer.step(closure, ascent_closure=ascent_closure)


@pytest.mark.parametrize("count", [1, 3], ids=["one-batch", "accumulated"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_functional_sam_is_papers(device, count, checkpointed):
    model, batches = make_model(device, checkpointed=checkpointed), make_batches(device, count)
    at, _, expected = functional_gradient(make_model(device), batches)
    loss = take_step(model, batches)
    assert_same_trajectory(
        [detached(model.parameters())], [[w - LR * x for w, x in zip(at, expected, strict=True)]], 1e-9
    )
    with torch.no_grad():
        losses = [make_model(device)(**batch).loss for batch in batches]
    assert float(loss) == pytest.approx(float(sum(losses)) / count)


def test_functional_sam_is_not_sam(device):
    """The loss's gradient by the logits is that of w, not of w + e."""
    batches = make_batches(device)
    functional, plain = make_model(device), make_model(device)
    take_step(functional, batches)
    optimizer = FastSAM(plain.parameters(), rho=RHO, lr=LR)

    def closure():
        optimizer.zero_grad()
        plain(**batches[0]).loss.backward()

    optimizer.step(closure)
    assert any((a - b).abs().max() > 1e-5 for a, b in zip(functional.parameters(), plain.parameters(), strict=True))


def test_loss_function_of_ones_own(device):
    one, other = make_model(device), make_model(device)
    batches = make_batches(device)
    take_step(one, batches)
    take_step(other, batches, loss_fn=lambda logits, batch: causal_loss(logits, batch["labels"]))
    assert_same_trajectory([detached(one.parameters())], [detached(other.parameters())], 1e-15)


def test_same_dropout_in_both_passes(device):
    """With rho so small that it changes nothing, the second pass computes the first one's gradient again."""
    model, other, batches = make_model(device, dropout=0.5), make_model(device, dropout=0.5), make_batches(device)
    torch.manual_seed(5)
    closure, ascent_closure = functional_sam_closures(model, None, *batches)
    FastSAM(model.parameters(), rho=1e-12, lr=LR, replay_rng=True).step(closure, ascent_closure=ascent_closure)
    torch.manual_seed(5)
    other(**batches[0]).loss.backward()
    expected = [p.detach() - LR * p.grad for p in other.parameters()]
    assert_same_trajectory([detached(model.parameters())], [expected], 1e-9)


def test_step_without_ascent_is_loss_gradient(device):
    model, batches = make_model(device), make_batches(device, 2)
    at, g, _ = functional_gradient(make_model(device), batches)
    loss = take_step(model, batches, schedule=schedules.Late(0.0, 10))
    assert float(loss) > 0
    assert_same_trajectory([detached(model.parameters())], [[w - LR * x for w, x in zip(at, g, strict=True)]], 1e-9)


def test_what_functional_sam_refuses(device):
    with pytest.raises(TypeError, match="at least one batch"):
        functional_sam_closures(nn.Linear(2, 2), None)
    _, ascent_closure = functional_sam_closures(nn.Linear(2, 2), None, torch.ones(1, 2))
    with pytest.raises(TypeError, match="has no loss; pass loss_fn"):
        ascent_closure()
    _, ascent_closure = functional_sam_closures(nn.LSTM(2, 2), None, torch.ones(1, 1, 2))
    with pytest.raises(TypeError, match="must return logits"):
        ascent_closure()


# ---- ESAM ----


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0])
def test_esam_descends_by_samples_that_rise_most(device, gamma):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(8, 5, dtype=torch.float64, generator=generator).to(device)
    targets = torch.randint(3, (8,), generator=generator).to(device)
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().to(device)
    names, at = [n for n, _ in model.named_parameters()], detached(model.parameters())

    def losses(weights, rows=slice(None)):
        outputs = functional_call(model, dict(zip(names, weights, strict=True)), (inputs[rows],))
        return F.cross_entropy(outputs, targets[rows], reduction="none")

    def gradient(weights, rows=slice(None)):
        weights = [w.detach().requires_grad_() for w in weights]
        return list(torch.autograd.grad(losses(weights, rows).mean(), weights))

    g = gradient(at)
    above = oracle.added(at, [RHO * x / oracle.length(g) for x in g])
    rise = losses(above).detach() - losses(at).detach()
    rows = sorted(range(8), key=lambda i: -float(rise[i]))[: int(8 * gamma)]
    expected = [w - LR * x for w, x in zip(at, gradient(above, rows), strict=True)]
    optimizer = FastSAM(model.parameters(), rho=RHO, lr=LR, method=methods.ESAM(beta=1.0))
    closure, ascent_closure = esam_closures(model, nn.CrossEntropyLoss(reduction="none"), inputs, targets, gamma=gamma)
    loss = optimizer.step(closure, ascent_closure=ascent_closure)
    assert float(loss) == pytest.approx(float(losses(at).mean()))
    assert_same_trajectory([detached(model.parameters())], [expected], 1e-9)


def test_esam_selects_some_samples():
    with pytest.raises(ValueError, match="gamma must be"):
        esam_closures(nn.Linear(2, 2), nn.MSELoss(reduction="none"), torch.ones(1, 2), torch.ones(1, 2), gamma=0)
