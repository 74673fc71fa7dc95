"""What several files of this folder share."""

import pytest

from fastsam.backends import load


@pytest.fixture
def triton_gpu(runnable, device):
    """The backend's module."""
    return load(runnable("triton"), device.type)
