"""Rarer layouts of parameters, on the ranks: each is trained, and the same model in one process."""

import torch
import torch.distributed as dist
import ways
from torch import nn
from torch.distributed._functional_collectives import all_reduce as all_reduce_async
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fastsam import FastSAM


class Tied(ways.Block):
    """Two layers that share a weight, and a weight that one of them also uses transposed."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(12, 16)
        self.again.weight = self.up.weight

    def forward(self, x):
        hidden = torch.tanh(self.up(self.norm(x))) + torch.sin(self.again(x))
        return self.one(self.head(self.down(hidden) + hidden @ self.up.weight))


class Experts(nn.Module):
    """Rows are for the experts in turn, on each rank; over a group each rank has some experts, and rows travel."""

    EXPERTS = 4

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(self.EXPERTS, 12, 12) / 4)
        self.group, self.ranks_in_batch = None, 1

    def forward(self, x):
        by_turn = x.view(-1, self.EXPERTS, self.ranks_in_batch * 12).transpose(0, 1)
        out = self._multiply(by_turn.reshape(self.EXPERTS, -1, 12))
        return out.view(by_turn.shape).transpose(0, 1).reshape(x.shape)

    def _multiply(self, by_expert):
        if self.group is None:
            return torch.bmm(by_expert, self.weight)
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        ranks, mine = self.group.size(), len(weight)
        received = _Exchange.apply(by_expert, self.group).view(ranks, mine, -1, 12).transpose(0, 1)
        out = torch.bmm(received.reshape(mine, -1, 12), weight).view(received.shape).transpose(0, 1)
        return _Exchange.apply(out.reshape(by_expert.shape), self.group)


class _Exchange(torch.autograd.Function):
    """An all-to-all of equal parts, which is its own transpose."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, out = group, torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, ctx.group), None


class WithExperts(ways.Block):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return super().forward(x + self.experts(x))


# ---- layouts: each returns the module, the data-parallel rank and size ----


def cpu_offload(model):
    return ways.fsdp2(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def mixed_precision(model):
    """Passes and reductions in other dtypes than the parameters'."""
    return ways.fsdp2(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64))


def tied(model):
    fully_shard(model.down, mesh=ways.mesh_of(dist.get_world_size()))
    fully_shard(model, mesh=ways.mesh_of(dist.get_world_size()))  # what is shared must be in one group
    return model, dist.get_rank(), dist.get_world_size()


def several_meshes(model):
    """One layer over a mesh of two dimensions (on four ranks HSDP), another replicated by the same API."""
    world = dist.get_world_size()
    fully_shard(model.up, mesh=ways.mesh_of(world // 2, 2))
    fully_shard(model.down, mesh=ways.mesh_of(world, 1))  # replicas of whole weights, as DTensors
    fully_shard(model, mesh=ways.mesh_of(world))
    return model, dist.get_rank(), world


def experts(model):
    """Experts over all ranks, the rest by FSDP2."""
    mesh = ways.mesh_of(dist.get_world_size())
    model.experts.group = mesh.get_group()
    weight = nn.Parameter(distribute_tensor(model.experts.weight.detach(), mesh, [Shard(0)], src_data_rank=None))
    model.experts.weight = weight
    weight.register_hook(lambda grad: grad / dist.get_world_size())  # the loss is the mean over the ranks
    fully_shard(model, mesh=mesh, ignored_params={weight})
    return model, dist.get_rank(), dist.get_world_size()


def experts_sharded(model):
    """On four ranks: experts over two of them, each expert sharded by FSDP2 over the other dimension of the mesh."""
    mesh = ways.mesh_of(2, dist.get_world_size() // 2)
    model.experts.group = mesh["d1"].get_group()
    whole = model.experts.weight.detach()
    model.experts.weight = nn.Parameter(distribute_tensor(whole, mesh["d1"], [Shard(0)], src_data_rank=None))
    fully_shard(model.experts, mesh=mesh["d0"])
    model.experts.set_gradient_divide_factor(float(dist.get_world_size()))
    fully_shard(model, mesh=ways.mesh_of(dist.get_world_size()))
    return model, dist.get_rank(), dist.get_world_size()


def replicated(model):
    """torch's ``replicate`` over FSDP's machinery."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    replicate(model, mesh=ways.mesh_of(dist.get_world_size()))
    return model, dist.get_rank(), dist.get_world_size()


def beside_plain(model):
    """Plain parameters, which every rank has, beside DTensors; one of them is an ignored parameter of FSDP's."""

    def average(param):
        dist.all_reduce(param.grad)
        param.grad /= dist.get_world_size()

    for param in (*model.one.parameters(), model.norm.weight):
        param.register_post_accumulate_grad_hook(average)
    ignored = {*model.one.parameters(), model.norm.weight}
    fully_shard(model, mesh=ways.mesh_of(dist.get_world_size()), ignored_params=ignored)
    return model, dist.get_rank(), dist.get_world_size()


LAYOUTS = {
    "cpu_offload": (ways.Block, cpu_offload),
    "mixed_precision": (ways.Block, mixed_precision),
    "tied": (Tied, tied),
    "several_meshes": (ways.Block, several_meshes),
    "experts": (WithExperts, experts),
    "replicate": (ways.Block, replicated),
    "beside_plain": (ways.Block, beside_plain),
}
LAYOUTS_OF_FOUR = LAYOUTS | {"experts_sharded": (WithExperts, experts_sharded)}


def compare(layout, base, method, backend):
    """Trains in a layout and in one process by ``reference``; returns the error."""
    make, lay_out = LAYOUTS_OF_FOUR[layout]
    module, rank, ranks = lay_out(make().double())
    single = make().double()
    if make is WithExperts:
        single.experts.ranks_in_batch = ranks
    optimizer = ways.optimizer_for(module, base, method, backend=backend, model=module)
    alone = ways.optimizer_for(single, base, method, backend="reference")
    ways.train(module, optimizer, ranks, rank)
    ways.train(single, alone, ranks, None)
    return ways.error_of(module, ways.whole(single))


# ---- what cannot be compared with a model of one process ----


def bfloat16_passes(steps):
    """FSDP2 with passes in bfloat16 and reductions in float32, against ``reference`` in float64 given the same passes.

    Returns:
        The error, and how far the weights would be without the ascents, both relative to the largest weight.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    for by_hand, rho in ((False, 0.1), (True, 0.1), (True, 0.0)):
        module, rank, ranks = ways.fsdp2(ways.Block(), mp_policy=policy)
        params = list(module.parameters())
        wholes = [nn.Parameter(p.detach().full_tensor().double()) for p in params] if by_hand else params
        backend = "reference" if by_hand else "native"
        optimizer = FastSAM(wholes, torch.optim.AdamW, rho=rho, lr=0.01, backend=backend)
        for step in range(steps):
            x, y = ways.batch(step, ranks, rank, torch.float32)
            closure = ways.closure_of(module, optimizer, x, y)
            optimizer.step(_passed_on(closure, params, wholes) if by_hand else closure)
        results.append(torch.cat([ways.whole_tensor(p).double().reshape(-1) for p in wholes]))
    mine, expected, without = results
    scale = expected.abs().max()
    return ((mine - expected).abs().max() / scale).item(), ((without - expected).abs().max() / scale).item()


def _passed_on(closure, params, wholes):
    """A closure that runs the sharded model at the whole weights, and gives these its gradients."""

    def run():
        with torch.no_grad():
            for param, whole in zip(params, wholes, strict=True):
                placed = distribute_tensor(
                    whole.detach().float(), param.device_mesh, param.placements, src_data_rank=None
                )
                param.copy_(placed)
                param.grad = None
        loss = closure()
        for param, whole in zip(params, wholes, strict=True):
            whole.grad = param.grad.full_tensor().double()
        return loss

    return run


def gradients_that_still_arrive():
    """The error of training with gradients that are results of collectives nobody has waited for."""
    module, rank, ranks = ways.fsdp2(ways.Block().double())
    optimizer = ways.optimizer_for(module, "adamw", "gsam")
    alone = [dist.new_group([other]) for other in range(ranks)][rank]
    kinds = set()
    for step in range(ways.STEPS):
        x, y = ways.batch(step, ranks, rank)
        closure = ways.closure_of(module, optimizer, x, y)

        def and_reduce(closure=closure):
            loss = closure()
            for param in module.parameters():
                local = all_reduce_async(param.grad.to_local(), "sum", alone)
                kinds.add(type(local).__name__)
                placed = param.grad.device_mesh, param.grad.placements
                param.grad = DTensor.from_local(
                    local, *placed, run_check=False, shape=param.shape, stride=param.stride()
                )
            return loss

        optimizer.step(and_reduce)
    return kinds, ways.error_of(module, ways.expected("adamw", "gsam", ranks))
