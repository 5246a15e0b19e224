from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from cluster import Cluster, cluster  # noqa: F401  # found by the line above; a fixture


@pytest.fixture(params=["sqlite", "redis"])
def fleet(cluster: Cluster, request: pytest.FixtureRequest) -> Cluster:  # noqa: F811  # the fixture that was imported
    """A cluster whose broker and result store are one file, or one Redis; a test configures it with ``limited``."""
    cluster.where = {}  # type: ignore[attr-defined]  # of this folder's tests only
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        cluster.where = {"broker__url": url, "results__url": url}  # type: ignore[attr-defined]  # as above
    return cluster
