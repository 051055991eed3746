"""Configuration of the documentation: https://www.sphinx-doc.org/en/master/usage/configuration.html"""

import os
import sys

# Wherever sphinx-build is called from
sys.path.insert(0, os.path.abspath(".."))

from sb3_ezv2 import __version__

project = "sb3-ezv2"
author = "sb3-ezv2 contributors"
copyright = "2026, sb3-ezv2 contributors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
exclude_patterns = ["_build"]
language = "en"
pygments_style = "sphinx"
# Sections of the changelog and of the results can be linked to.
myst_heading_anchors = 3

# Types stand beside the parameters that a docstring explains, not in a signature of fifty arguments.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Docstrings write absolute values as |x|, which is the syntax of a substitution.
rst_epilog = "\n".join(rf".. |{name}| replace:: \|{name}\|" for name in ("x", "y", "D"))

html_theme = "sphinx_rtd_theme"
html_title = f"sb3-ezv2 {release}"
html_theme_options = {"navigation_depth": 3}
