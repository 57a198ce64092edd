"""Configuration of Sphinx; ``sphinx-build -W docs build/docs`` builds the pages."""

from nord_snn import __version__

project = "nord-snn"
author = "nord-snn contributors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_ivar = True
napoleon_custom_sections = [("Shapes", "params_style"), ("Source", "notes_style")]
exclude_patterns = ["build"]

html_theme = "furo"
html_title = "nord-snn"
html_static_path: list[str] = []
