"""``python -m fastsam demo``: SGD against FastSAM on digits with wrong labels; a table and a picture."""

from __future__ import annotations
