"""Measures of sharpness on the ranks."""

import torch
import ways
from torch import nn
from torch.nn import functional as F

from fastsam import FastSAM, sharpness
from fastsam.distributed import local_of

BATCHES = 2
PER_RANK = 3


def model_and_data(ranks):
    """The same model everywhere, and the batches of ``ranks`` ranks together."""
    torch.manual_seed(0)
    model = ways.Block().double()
    x, _ = ways.batch(0, 1, 0)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(PER_RANK * ranks, *x.shape[1:], dtype=x.dtype, generator=generator) for _ in range(BATCHES)]
    with torch.no_grad():
        outputs = model(inputs[0])
    targets = [torch.randn(len(i), *outputs.shape[1:], dtype=x.dtype, generator=generator) for i in inputs]
    return model, list(zip(inputs, targets, strict=True))


def measure(model, data):
    arguments = model, F.mse_loss, data
    spectrum = {"hvp": "finite_difference"}
    found = sharpness.hessian_eigenvalues(*arguments, 2, eigenvectors=True, **spectrum)
    line = sharpness.loss_line(*arguments, sharpness.filter_normalized(model), [0.0, 0.5])
    return {
        "ascent": sharpness.ascent(*arguments, 0.1).value,
        "adaptive": sharpness.ascent(*arguments, 0.1, adaptive=True).value,
        "worst": sharpness.worst(*arguments, 0.1, steps=4).value,
        "average": sharpness.average(*arguments, 0.1, samples=4).value,
        "lambda_max": found.values.tolist(),
        "residuals": (found.residuals < 1e-4).all().item(),
        "vectors": [v.shape for v in found.vectors[0]] == [p.shape for p in model.parameters()],
        "trace": float(sharpness.hessian_trace(*arguments, samples=6, **spectrum)),
        "line": line.losses,
    }


def expected(ranks):
    """In one process."""
    return measure(*model_and_data(ranks))


def distributed(way):
    """The model over the ranks, and this rank's part of each batch."""
    import torch.distributed as dist

    model, data = model_and_data(dist.get_world_size())
    mine = slice(PER_RANK * dist.get_rank(), PER_RANK * (dist.get_rank() + 1))
    if way == "fsdp2":
        model, _, _ = ways.fsdp2(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    return model, [(x[mine], y[mine]) for x, y in data]


def step_on(model, x, y):
    """What one step says of its ascent: the loss at w, the loss at w + e, the norm."""
    optimizer = FastSAM(model.parameters(), rho=0.1, lr=0.1, model=model)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return [float(value) for value in optimizer.last_ascent]


def last_ascent(way):
    """On this rank."""
    model, data = distributed(way)
    return step_on(model, *data[0])


def sharded(way):
    """On this rank, with its part of each batch; and whether the weights came back."""
    model, data = distributed(way)
    before = [p.detach().clone() for p in model.parameters()]
    found = measure(model, data)
    back = all(torch.equal(local_of(p), local_of(b)) for p, b in zip(model.parameters(), before, strict=True))
    return found, back


def refusal():
    """What double backward through shards says, and a solver's exception on the first rank alone."""
    import torch.distributed as dist

    from fastsam.sharpness.ranks import Ranks

    model, data = model_and_data(dist.get_world_size())
    model, _, _ = ways.fsdp2(model)
    said = []
    try:
        sharpness.hessian_eigenvalues(model, F.mse_loss, data, 1)
    except ValueError as error:
        said.append(str(error))

    def fails(product):
        product(torch.ones(3, dtype=torch.float64))
        raise ArithmeticError("no luck")

    try:
        Ranks(model, list(model.parameters())).solve(lambda vector: vector, 3, fails)
    except ArithmeticError as error:
        said.append(str(error))
    return said
