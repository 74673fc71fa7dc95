"""``python -m fastsam sharpness``: how sharp the minima of SGD and of FastSAM are."""
