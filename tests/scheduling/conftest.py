from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from cluster import Cluster, WorkerProcess, cluster  # noqa: F401  # cluster: found by the line above; a fixture

SKEWED = """
import os
import time

import shop
from umbel import Umbel

class Skewed:
    def time(self):
        return time.time() + float(os.environ.get("SKEW", "0"))

app = shop.define(Umbel("shop", clock=Skewed()))
"""
"""The app of the shop, whose clock is wrong by SKEW seconds."""

StartScheduler = Callable[..., WorkerProcess]


@pytest.fixture
def scheduler(cluster: Cluster) -> Iterator[StartScheduler]:  # noqa: F811  # the fixture that was imported
    """``scheduler(skew=2.0)``: start ``umbel scheduler``, and return when it is ready; ended after the test."""
    (cluster.folder / "skewed.py").write_text(SKEWED)
    made: list[WorkerProcess] = []

    def start(*arguments: str, skew: float = 0.0) -> WorkerProcess:
        process = WorkerProcess(
            [sys.executable, "-m", "umbel", "-A", "skewed", "scheduler", *arguments],
            folder=cluster.folder,
            env={**cluster.env, "SKEW": str(skew)},
            log=cluster.folder / f"scheduler-{len(made) + 1}.log",
        )
        made.append(process)
        return process.wait_ready()

    yield start
    for process in made:
        if process.running:
            process.kill()
        lines = process.text.splitlines()
        print(f"--- {process.log.name} (exit {process.process.returncode}, {len(lines)} lines)")
        print("\n".join(lines[-80:]))
