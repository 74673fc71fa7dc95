"""setuptools' build backend, which finds torch also where pip builds in isolation.

Such a build sees only its build requirements. This one also looks for torch in the environment that the package is
installed into, and asks for torch as a build requirement where there is none: the package depends on it anyway.
"""

import importlib.util
import os
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the hooks that stay as they are)

# Last: setuptools and the other build requirements are those of the isolated environment.
sys.path += [path for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} if path not in sys.path]


def get_requires_for_build_wheel(config_settings=None):
    """Returns what a wheel's build needs besides pyproject.toml's requirements."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_needed_to_compile()]


def get_requires_for_build_editable(config_settings=None):
    """Returns what an editable build needs besides pyproject.toml's requirements."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_needed_to_compile()]


def _needed_to_compile():
    if os.environ.get("FASTSAM_BUILD") == "none":
        return []
    has_torch = importlib.util.find_spec("torch") is not None
    return ["ninja"] if has_torch else ["ninja", "torch>=2.10"]
