"""Formulas as MathML, made by docutils at build time: pages need neither a script nor a font from the network."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

# What docutils lacks, in the words it has.
_REPLACEMENTS = (
    (re.compile(r"\\([bB]igg?)(?![a-zA-Z])(?=\s*(?:[)\]]|\\\}|\\rangle))"), r"\\\1r"),
    (re.compile(r"\\([bB]igg?)(?![a-zA-Z])"), r"\\\1l"),
    (re.compile(r"\\([td]?frac)\s*(\d)\s*(\d)"), r"\\\1{\2}{\3}"),
    (re.compile(r"\\dots(?![a-zA-Z])"), r"\\ldots"),
)


def _convert(node: nodes.Node, source: str, *, block: bool) -> str:
    for pattern, replacement in _REPLACEMENTS:
        source = pattern.sub(replacement, source)
    try:
        # Norm bars have no opening and closing form; stretched, the first would grow with all that follows.
        return re.sub(r"<mo\b[^>]*>‖", '<mo stretchy="false">‖', tex2mathml(source, as_block=block))
    except MathError as error:
        logger.warning("a formula cannot be shown: %s in %r", error, source, location=node)
        return f"<code>{source}</code>"


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_convert(node, node.astext(), block=False))
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math-block"))
    if node.get("number"):
        translator.body.append(f'<span class="equation-number">({node["number"]})</span>')
    translator.body.append(_convert(node, node.astext(), block=True))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
