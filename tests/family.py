"""The names of oracle.py that tests of the package's inside still import from here."""

from oracle import dot, length

__all__ = ["dot", "norm"]
norm = length
