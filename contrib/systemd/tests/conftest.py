from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tests/support"))

from cluster import cluster  # noqa: F401  # found by the line above; a fixture
