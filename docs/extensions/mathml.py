"""Writes formulas as MathML, which browsers show without a script and without the network."""

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml


def setup(app):
    """Registers the writer with Sphinx."""
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_inline(writer, node):
    """Writes a formula within a line."""
    writer.body.append(tex2mathml(node.astext()))
    raise SkipNode


def write_block(writer, node):
    """Writes a formula of its own lines."""
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode
