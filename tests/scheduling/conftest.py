from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from cluster import Cluster, WorkerProcess, cluster  # noqa: F401  # cluster: found by the line above; a fixture
from schedule_site import Site

SKEWED = """
import json
import os
import signal
import time

import shop
from umbel import Umbel, hookimpl

class Skewed:
    def time(self):
        return time.time() + float(os.environ.get("SKEW", "0"))

class Watched:
    @hookimpl
    def umbel_before_publish(self, messages):
        if os.path.exists(f"stop-{os.getpid()}"):
            os.unlink(f"stop-{os.getpid()}")
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.2)  # another thread may get the signal: this one stops a moment later

    @hookimpl(wrapper=True)
    def umbel_make_transport(self):
        transport = yield
        publish = transport.publish

        async def noted(messages, *, timeout):
            line = json.dumps({"pid": os.getpid(), "at": time.time(), "ids": [message.id for message in messages]})
            with open("published.jsonl", "a") as published:
                published.write(line + "\\n")
            await publish(messages, timeout=timeout)

        transport.publish = noted
        return transport

app = shop.define(Umbel("shop", clock=Skewed(), plugins=[Watched()]))
"""
"""The app of the shop, whose clock is wrong by SKEW seconds; it notes what it publishes, and stops before it if told so."""

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


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def make(url: str) -> Callable[..., Site]:
    """``make(**settings)``: a site; all of one test have the same broker and stores."""

    def made(plugins: Sequence[object] = (), **settings: Any) -> Site:
        return Site(url, {key.replace("__", "."): value for key, value in settings.items()}, plugins)

    return made
