"""What several files of this folder share."""

import pytest
from trained import Trained


@pytest.fixture
def trained(backend, device):
    return lambda dtype, variant, **options: Trained(backend, device, dtype, variant, **options)
