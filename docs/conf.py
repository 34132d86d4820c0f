"""Settings of Sphinx: `make docs`. Guides are Markdown, the API reference comes from the docstrings."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "hf_fae"
author = "The hf_fae developers"
copyright = "the hf_fae developers"
version = release = installed_version("hf_fae")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "api_members",
    "repository_links",
]
exclude_patterns = ["_*"]
default_role = "py:obj"  # `name` in a docstring is a link where that name has a page, and code where it has none

myst_enable_extensions = ["html_image"]
myst_heading_anchors = 4  # headings have the anchors that GitHub gives them

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # outputs share names of attributes: links would be ambiguous
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_title = f"hf_fae {release}"
html_copy_source = False
html_show_sphinx = False
