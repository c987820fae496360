from respiro import __version__

project = "respiro"
author = "The respiro developers"
copyright = "2026, The respiro developers"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
html_theme = "furo"
html_title = f"respiro {__version__}"
exclude_patterns = ["_build"]
# Base classes document themselves elsewhere.
napoleon_google_docstring = True
nitpicky = False
