"""A GPU that only counts: Triton's host path on CPU tensors, with kernels that are neither compiled nor run."""

import collections

import pytest
import torch
from gpu_steps import CountingSyncs, allow_uploads_of_graphs_alone, hide_the_host

from fastsam.backends import triton_gpu
from fastsam.runtime import streams


class FakeGPU:
    """Counts what a step asks of a GPU.

    Attributes:
        launches: the names of the launched kernels, in their order.
        compiled: how many kernels were compiled and loaded.
        capturing: whether a CUDA graph is being captured.
        syncs: how often operators waited for the GPU, by name.
    """

    def __init__(self):
        self.launches, self.compiled, self.capturing = [], 0, False
        self.syncs = collections.Counter()

    def compile(self, kernel):
        """Something like Triton's compiled kernel."""
        self.compiled += 1
        fake = self

        class Compiled:
            def __getitem__(self, grid):
                def launch(*arguments):
                    assert len(arguments) == len(kernel.function.arg_names)
                    pairs = zip(kernel.arguments, arguments, strict=False)
                    for name, argument in pairs:
                        assert (argument is None) == (name in kernel.absent), name
                        if isinstance(argument, torch.Tensor):
                            assert argument.dtype == triton_gpu.kernels.POINTERS[name], name
                            assert argument.is_contiguous(), name
                    fake.launches.append(kernel.name)

                return launch

        return Compiled()

    def count(self, step):
        """What one call of ``step`` takes: launches, compilations, waits."""
        self.launches.clear()
        self.compiled, self.syncs = 0, collections.Counter()
        with CountingSyncs(self.syncs):
            step()
        return list(self.launches), self.compiled, dict(self.syncs)


def uploads(optimizer):
    """How many copies the optimizer's tables have sent up so far."""
    tables = optimizer._engine.tables
    return sum(table.attached(triton_gpu._View).copy.uploads for table in tables)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A :class:`FakeGPU`, as which the backend "triton" sees the CPU."""
    pytest.importorskip("triton")
    fake, kernels = FakeGPU(), triton_gpu.kernels

    def prepare(self, device):
        if self not in known:
            known[self] = fake.compile(self)
        return known[self]

    known = {}
    hide_the_host(monkeypatch)
    monkeypatch.setattr(kernels, "interpreted", False)
    monkeypatch.setattr(kernels.Kernel, "prepare", prepare)
    monkeypatch.setattr(triton_gpu, "unsupported_reason", lambda request: "")
    monkeypatch.setattr(streams, "is_capturing", lambda device: fake.capturing)
    allow_uploads_of_graphs_alone(monkeypatch)
    return fake
