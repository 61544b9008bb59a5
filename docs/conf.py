"""The site: `make docs`. Pages are Markdown and executed notebooks; `_ext/` fills in what comes from data."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from mathml import FONTS

import ridgeline

project = "Ridgeline"
author = copyright = "The Ridgeline authors"
version = release = ridgeline.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "ridgeline_site",
    "mathml",
    "docstrings",
]
exclude_patterns = ["_ext", "results", "examples", "notebooks/results"]

# Pages whose numbers are filled in from committed results while the site is built.
ridgeline_templates = {"index", "bill", "placement", "measured"}
ridgeline_templates |= {f"reference/{page.stem}" for page in Path(__file__).parent.glob("reference/*.md")}

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"

# A rendered notebook brings its own code and outputs; solutions stay folded until the reader asks.
nb_code_prompt_show = "Show the solution"
nb_code_prompt_hide = "Hide the solution"
copybutton_exclude = ".linenos, .gp, .go"

autodoc_default_options = {"members": True, "member-order": "bysource", "undoc-members": False}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_mock_imports = [
    name
    for name in ("torch", "fastapi", "uvicorn", "pydantic", "prometheus_client", "matplotlib")
    if importlib.util.find_spec(name) is None
]
add_module_names = False
toc_object_entries = False
suppress_warnings = ["ref.python"]  # a builtin in a signature is also the name of a field
python_maximum_signature_line_length = 90
default_role = "code"

html_theme = "furo"
html_title = "Ridgeline"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static", str(FONTS)]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e4f", "color-brand-content": "#0b6e4f"},
    "dark_css_variables": {"color-brand-primary": "#5fd3a4", "color-brand-content": "#5fd3a4"},
    "navigation_with_keys": True,
}
pygments_style = "tango"
pygments_dark_style = "github-dark"
