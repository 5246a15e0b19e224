from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from cluster import cluster  # noqa: F401  # found by the line above; a fixture
