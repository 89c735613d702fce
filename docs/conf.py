"""Sphinx configuration. The build reads nothing from the network, and neither do the pages it makes."""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

from bilevel import __version__  # noqa: E402  (the path comes first)

project = "bilevel"
author = "The bilevel developers"
copyright = "The bilevel developers"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
exclude_patterns = ["_build", "_extensions"]

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Single backquotes in docstrings name arguments and public names; the latter become links.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"bilevel {release}"
html_static_path = ["_static"]
html_css_files = ["bilevel.css"]
html_copy_source = False
html_show_sphinx = False


def name_params(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """`Params` instead of the dictionary that it stands for, as in the sources."""

    def renamed(text: str | None) -> str | None:
        return None if text is None else re.sub(r"dict\[str, ~?(?:torch\.)?Tensor\]", "Params", text)

    return renamed(signature), renamed(returns)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-signature", name_params)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
