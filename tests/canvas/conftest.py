"""The model of canvases lies beside the tests that share it, the cluster in the tests' support."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))

pytest.register_assert_rewrite("canvas_fleet", "canvas_model")  # what they compare is shown where it differs
