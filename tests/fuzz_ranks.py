"""Lives of an optimizer (fuzz_surroundings.py) under DistributedDataParallel, on two gloo ranks.

The ranks have other data and other seeds. After every operation the replicas must have the same bits.
"""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing
from fuzz_lives import lives
from fuzz_surroundings import Subject
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn
from torch.nn.parallel import DistributedDataParallel

RANKS = 2


class Model(nn.Module):
    """A loss whose gradient depends on the weights and on the rank's data."""

    def __init__(self, params):
        super().__init__()
        self.params = nn.ParameterList(params)

    def forward(self, x):
        return sum((p.double() ** 4 / 4 - x * p.double() ** 2).sum() for p in self.params)


class Replica(Subject):
    """One rank's."""

    model = None

    def wrap(self, is_flat):
        """The model of the present parameters; making it writes to the weights."""
        key = [(id(param), param.shape) for param in self.params], is_flat
        if self.model is None or self.key != key:
            self.key = key
            self.model = DistributedDataParallel(Model(self.params), gradient_as_bucket_view=is_flat)
        return self.model

    def closure(self, gradients, scale=1.0):
        is_flat = gradients == "flat" and not self.optimizer.perturbed
        model = self.model if self.optimizer.perturbed else self.wrap(is_flat)

        def closure():
            with self.in_closure():
                self.optimizer.zero_grad(set_to_none="zeroed" not in gradients)
                self.backward(scale, model)

        return closure

    def backward(self, scale=1.0, model=None):
        with torch.enable_grad():
            ((model or self.wrap(False))(0.1 * (1 + dist.get_rank())) * scale).backward()

    def refuse(self, what):
        # DistributedDataParallel may have written to all weights since the last step, as a model of embeddings does.
        if what != "weights are loaded":
            super().refuse(what)

    def operate(self, what):
        # Of a parameter that an earlier DistributedDataParallel has wrapped autograd remembers the shape.
        super().operate("replace" if what == "resize" else what)

    def assert_same_on_all_ranks(self):
        mine = torch.cat([param.detach().flatten().double() for param in self.params])
        everyones = [torch.empty_like(mine) for _ in range(RANKS)]
        dist.all_gather(everyones, mine)
        assert bool(torch.isfinite(mine).all())
        assert torch.equal(*everyones), f"{int((everyones[0] != everyones[1]).sum())} weights differ between the ranks"


def work(rank, address, backend, count, number):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    quiet = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=count)

    # Shrinking would let the ranks draw different lives: the first that fails is reported as it is.
    @seed(number)
    @settings(quiet, phases=[Phase.generate], report_multiple_bugs=False)
    @given(lives())
    def carry_out(life):
        torch.manual_seed(7 + rank)
        replica = Replica(backend, life)
        for operation in life.operations:
            replica.carry_out(operation)
            replica.assert_same_on_all_ranks()

    carry_out()
    dist.destroy_process_group()


def run(backend, folder, count, number=0):
    """Carries out ``count`` lives; ``folder``: for the ranks' rendezvous."""
    address = f"file://{os.path.join(folder, 'rendezvous')}"
    torch.multiprocessing.spawn(work, (address, backend, count, number), nprocs=RANKS)
