"""Sphinx's configuration of these pages: ``make docs``."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

import fastsam

project = "FastSAM"
author = "The FastSAM authors"
copyright = author
version = release = fastsam.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "repository",
]
exclude_patterns = ["extensions", "_build"]

# Links to PyTorch's own pages need the network: FASTSAM_INTERSPHINX=1, as the workflow that publishes the pages sets.
if os.environ.get("FASTSAM_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_mock_imports = ["accelerate", "ignite", "lightning", "timm", "transformers"]  # not installed here
autodoc_typehints = "none"  # the docstrings say what an argument may be
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"FastSAM {version}"
html_theme_options = {"light_css_variables": {"code-font-size": "0.75em"}}  # lines of 100 characters
html_show_sourcelink = False
html_copy_source = False
