"""Every method in every precision by the CUDA kernels, compiled for the CPU."""

import pytest
from contract.test_method_precision import test_passes_and_updates  # noqa: F401 (run here, too)
from operations.test_cuda_kernels import cuda_kernels, operators  # noqa: F401 (fixtures)

pytestmark = [
    pytest.mark.parametrize("device", ["cpu"], indirect=True),
    pytest.mark.parametrize("backend", ["native"], indirect=True),
    pytest.mark.usefixtures("backend", "cuda_kernels"),
]
