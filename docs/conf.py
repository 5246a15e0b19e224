"""Sphinx configuration. The reference pages that the code writes are made here, before anything is read."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402  # beside this file, found by the line above

generate.write(HERE / "reference" / "_generated")

project = "Umbel"
author = "the Umbel authors"
copyright = "the Umbel authors"
version = release = version_of("umbel-core")

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "reference/_generated"]
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"Umbel {version}"
html_show_sourcelink = False
html_copy_source = False
