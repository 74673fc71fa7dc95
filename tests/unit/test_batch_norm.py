"""``runtime/batch_norm.py``: what saving and restoring statistics costs."""

from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam.runtime.batch_norm import RunningStatistics


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_one_copy_for_each_dtype():
    """On a GPU each operator is a launch; ResNet-50 has 159 buffers."""
    layers = [nn.BatchNorm1d(3) for _ in range(10)] + [nn.BatchNorm1d(2, dtype=torch.float64)]
    statistics = RunningStatistics(nn.Sequential(*layers))
    statistics.save()  # allocates
    expected = [buffer.clone() for layer in layers for buffer in layer.buffers()]
    with _Calls() as calls:
        statistics.save()
    assert calls.counts == {"_foreach_copy_": 3}  # float32, float64, and the counts of batches in int64
    for layer in layers:
        for buffer in layer.buffers():
            buffer.add_(1)
    with _Calls() as calls:
        statistics.restore()
    assert calls.counts == {"_foreach_copy_": 3}
    for buffer, value in zip((b for layer in layers for b in layer.buffers()), expected, strict=True):
        assert torch.equal(buffer, value)
