"""The documentation as a site: ``sphinx-build -W docs docs/_build``; it needs no network, to build or to read."""

import inspect
from pathlib import Path

import arq_env
from arq_env.env import ArqEnv

project, author = "ARQ", "the authors of ARQ"
version = release = arq_env.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "reference/_*"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
highlight_language = "none"
html_theme = "furo"
html_title = f"ARQ {version}"
html_theme_options = {"source_edit_link": ""}
autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
suppress_warnings = ["myst.xref_missing"]

nitpicky = True
#: Types of other packages; whatever of these two is referred to must be there.
nitpick_ignore_regex = [("py:.*", r"(?!arq_).*"), ("py:class", r".*\._\w+|arq_agents\.finishing\.Name")]

# ArqEnv's docstring is Markdown, as Gymnasium's own: reference/environment.md includes it
Path(__file__).with_name("reference").joinpath("_arq_env.md").write_text(inspect.getdoc(ArqEnv) or "", encoding="utf-8")


def setup(app):
    app.connect("autodoc-process-docstring", lambda app, what, name, obj, options, lines: lines.clear() if obj is ArqEnv else None)
