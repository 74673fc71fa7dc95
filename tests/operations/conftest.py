"""Small chunks, for the tests of their boundaries."""

import pytest
from scene import CHUNK


@pytest.fixture
def small_chunks(operations, monkeypatch):
    """Of ``CHUNK`` elements, where the backend has a chunk size."""
    if hasattr(operations, "CHUNK_SIZE"):
        monkeypatch.setattr(operations, "CHUNK_SIZE", CHUNK)
