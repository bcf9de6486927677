"""Sphinx builds the site from the pages in docs/ and the READMEs of the packages: `make docs`.

The source folder is the checkout, so that a link works in a repository browser and on the site.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "docs")]

project = "movienet-stream"
author = project
release = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
version = release
project_copyright = "the authors of movienet-stream, Apache-2.0"

extensions = ["myst_parser", "config_reference", "command_reference"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "README.md", "**/README.md", "CHANGELOG.md", "RELEASING.md"]
exclude_patterns = [".*", "build", "dist", "tests/golden", "demo-data", "**/node_modules"]

default_role = "code"  # of the help texts, which quote commands in backticks
smartquotes = False  # "--config" keeps its hyphens

myst_enable_extensions = ["colon_fence", "html_image"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"movienet-stream {release}"
html_additional_pages = {"index": "redirect.html"}
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["site.css"]
templates_path = ["templates"]
