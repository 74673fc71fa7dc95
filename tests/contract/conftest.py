"""What several files of this folder share."""

import internals
import pytest
from registry import METHODS
from trained import Trained


@pytest.fixture
def trained(backend, device):
    return lambda dtype, variant, **options: Trained(backend, device, dtype, variant, **options)


@pytest.fixture
def case(name, backend, device):
    """The method ``name``, if ``backend`` can run it on ``device``."""
    if reason := internals.unavailable(backend, device, METHODS[name].method):
        pytest.skip(reason)
    return METHODS[name]
