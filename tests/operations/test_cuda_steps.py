"""What a step of each method asks of a GPU by way of the CUDA kernels (on the CPU): launches, uploads, waits."""

import collections

import pytest
from fake_gpu import CountingSyncs
from gpu_steps import Steps, every_base, every_method, every_precision
from operations.test_cuda_kernels import cuda_kernels, operators  # noqa: F401 (fixtures)

from fastsam import methods
from fastsam.backends.native_table import CudaTable

pytestmark = [
    pytest.mark.parametrize("device", ["cpu"], indirect=True),
    pytest.mark.parametrize("backend", ["native"], indirect=True),
    pytest.mark.usefixtures("backend"),
]


def count(steps, kernels):
    """Launches, uploads and waits of one step."""

    def uploads():
        return sum(table.attached(CudaTable)._copy.uploads for table in steps.optimizer._engine.tables)

    launches, sent, waits = kernels.launches(), uploads(), collections.Counter()
    with CountingSyncs(waits):
        steps()
    return kernels.launches() - launches, uploads() - sent, dict(waits)


@every_method
@every_base
@every_precision
def test_steady_steps(cuda_kernels, method, base, precision):  # noqa: F811
    """Also with new gradients in every step: their addresses are arguments."""
    steps = Steps("native", base, method=method, **precision)
    for _ in range(4):
        steps()
    for fresh in (False, False, True, True):
        steps.closure(fresh)
        launches, uploads, waits = count(steps, cuda_kernels)
        assert launches <= 2 + 3 * method.ascents
        # Where steps with and without an ascent take turns, so do the addresses of backups.
        assert uploads <= isinstance(method, methods.LookSAM)
        assert waits == {}


@every_base
def test_plain_sam_is_three_launches(cuda_kernels, base):  # noqa: F811
    steps = Steps("native", base)
    for _ in range(3):
        steps()
    assert count(steps, cuda_kernels) == (3, 0, {})
