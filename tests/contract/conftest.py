"""What several files of this folder share."""

import pytest
from registry import METHODS
from trained import Trained


@pytest.fixture
def trained(backend, device):
    return lambda dtype, variant, **options: Trained(backend, device, dtype, variant, **options)


@pytest.fixture
def case(name):
    """The method ``name``."""
    return METHODS[name]
