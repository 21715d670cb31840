"""How Sphinx builds the site (`make docs`): pages are Markdown, API pages come from the docstrings.

Nothing on a page is fetched from the network: formulas become MathML, which browsers draw themselves.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx

from pix2mass import cli, config

project = "pix2mass"
author = "The pix2mass developers"
copyright = author  # noqa: A001  the name Sphinx reads
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]
default_role = "literal"
highlight_language = "text"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The tutorial runs when its cells have changed since it last ran; `rm -r docs/build` makes it run again.
nb_execution_mode = "cache"
nb_execution_in_temp = True
os.environ["JUPYTER_PATH"] = str(Path(__file__).parent / "_jupyter")  # a quiet kernel
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
autoclass_content = "both"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"
smartquotes = False
maximum_signature_line_length = 88

html_theme = "furo"
html_title = "pix2mass"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False

_BARS = re.compile(r"\|(?=(?:[^`]*``[^`]*``)*[^`]*$)")
"""Bars outside of literals."""


def _mathml(translator: Any, node: nodes.Element) -> None:
    display = "inline" if isinstance(node, nodes.math) else "block"
    formula = latex2mathml.converter.convert(node.astext(), display=display)
    translator.body.append(formula if display == "inline" else f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def _docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Read docstrings as this package writes them, before napoleon does: a colon is part of a sentence and ends no
    type, a bar is an absolute value and no substitution. Settings get their default."""
    if lines and lines[0].startswith("Create a new model by parsing"):  # what pydantic says of every config's __init__
        lines.clear()
    lines[:] = [":returns:" if line == "Returns:" else _BARS.sub(r"\\|", line) for line in lines]
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment, in whose line napoleon finds no type
    owner_name, _, field_name = name.rpartition(".")
    module_name, _, class_name = owner_name.rpartition(".")
    if what == "attribute" and module_name == "pix2mass.config":
        field = getattr(config, class_name).model_fields.get(field_name)
        if field is not None and field.default is not PydanticUndefined and not isinstance(field.default, BaseModel):
            lines += ["", f"Default: ``{field.default!r}``"]


def _command_line(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append every verb's help to its page."""
    if docname == "api/command_line":
        text = cli.app.generate_docs(usage_name="pix2mass")
        source[0] += text[text.index("\n## pix2mass ") :]
        for module in (cli, config):
            app.env.note_dependency(str(module.__file__))


def _signature(app: Sphinx, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, None] | None:
    """Configs list their settings below; as a signature they would fill a page."""
    return ("", None) if what == "class" and isinstance(obj, type) and issubclass(obj, BaseModel) else None


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
    app.connect("source-read", _command_line)
    app.connect("autodoc-process-docstring", _docstring, priority=400)
    app.connect("autodoc-process-signature", _signature)
