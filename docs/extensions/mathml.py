"""Writes formulas as MathML, which browsers show without a script and without the network."""

import re
from html import escape

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

# What docutils does not know, in commands that it knows.
OTHERWISE = {r"\\([Bb]igg?)(?=\s*[(\[])": r"\\\1l", r"\\([Bb]igg?)(?=\s*[)\]])": r"\\\1r", r"\\tfrac": r"\\frac"}


def setup(app):
    """Registers the writer with Sphinx."""
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_inline(writer, node):
    """Writes a formula within a line."""
    writer.body.append(formula(node))
    raise SkipNode


def write_block(writer, node):
    """Writes a formula of its own lines."""
    writer.body.append(f'<div class="math">{formula(node, as_block=True)}</div>')
    raise SkipNode


def formula(node, as_block=False):
    """Returns a formula's MathML."""
    tex = node.astext()
    for pattern, replacement in OTHERWISE.items():
        tex = re.sub(pattern, replacement, tex)
    try:
        return tex2mathml(tex, as_block=as_block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s: %s", error, tex, location=node)
        return escape(tex)
