"""Real workers, asked as a probe asks."""

from __future__ import annotations

import json
import re
import signal
import socket
import sqlite3
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, WorkerProcess, until


def configure(cluster: Cluster, **settings: Any) -> Cluster:
    return cluster.configure(plugins__hooks=["health"], plugins__options__health__port=0, **settings)


def probe(worker: WorkerProcess, path: str, timeout: float = 20.0) -> tuple[int, str]:
    """Status and text. Raises ``OSError`` if nobody answers in time."""
    port = until(lambda: re.search(r"served at http://127\.0\.0\.1:(\d+)/", worker.text), "the port")[1]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_worker_is_ready_until_it_is_told_to_stop_and_live_until_it_ends(cluster: Cluster) -> None:
    worker = configure(cluster, worker__concurrency=1).worker()
    until(lambda: probe(worker, "/ready") == (200, "ok\n"), "ready")
    assert probe(worker, "/live") == (200, "ok\n")
    task = cluster.send("gated", str(cluster.folder / "gate"))
    cluster.ledger.wait_start(task.id)
    status, text = probe(worker, "/")
    told = json.loads(text)
    assert (status, told["live"], told["ready"], told["reasons"], told["phase"]) == (200, True, True, [], "running")
    assert (told["held"], told["queues"], len(told["pool"]["processes"])) == (1, ["default"], 1)
    assert 0 <= told["last_poll_age"] < 20
    worker.tell(signal.SIGTERM)
    until(lambda: probe(worker, "/ready") == (503, "the worker is stopping\n"), "not ready")
    assert probe(worker, "/live") == (200, "ok\n")
    assert json.loads(probe(worker, "/")[1])["phase"] == "stopping"
    (cluster.folder / "gate").touch()
    assert worker.wait(40) == 0
    with pytest.raises(OSError, match="refused"):
        probe(worker, "/live")


SLOW = """
import pathlib, time
from umbel import hookimpl

class Slow:
    @hookimpl
    def umbel_child_started(self):
        while not pathlib.Path("gate").exists():
            time.sleep(0.01)
"""


def test_a_worker_that_starts_is_live_and_not_ready(cluster: Cluster) -> None:
    (cluster.folder / "slow.py").write_text(SLOW)
    cluster.configure(plugins__hooks=["health", "slow:Slow"], plugins__options__health__port=0, worker__pool="threads")
    worker = cluster.worker(wait=False)
    assert probe(worker, "/live") == (200, "ok\n")
    assert probe(worker, "/ready") == (503, "the worker is starting\n")
    (cluster.folder / "gate").touch()
    until(lambda: probe(worker, "/ready")[0] == 200, "ready")


def test_without_its_broker_a_worker_is_not_ready_and_then_not_live_and_comes_back(cluster: Cluster) -> None:
    cluster.configure(
        plugins__hooks=["health"], plugins__options__health={"port": 0, "max_poll_age": 1.0, "restart_after": 2.5}
    )
    worker = cluster.worker()
    # An idle broker is polled every few seconds only, so give it something to say.
    until(lambda: cluster.send("quick").get(timeout=30) is None and probe(worker, "/ready")[0] == 200, "ready")
    with closing(sqlite3.connect(cluster.folder / "broker.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        _, text = until(lambda: (a := probe(worker, "/ready"))[0] == 503 and a, "not ready")
        assert re.fullmatch(r"the broker has not answered for \d+ s, longer than max_poll_age = 1 s\n", text)
        assert probe(worker, "/live")[0] in (200, 503)
        _, text = until(lambda: (a := probe(worker, "/live"))[0] == 503 and a, "not live")
        assert "longer than restart_after = 2.5 s" in text
        other.execute("ROLLBACK")
    until(lambda: cluster.send("quick").get(timeout=30) is None and probe(worker, "/ready")[0] == 200, "ready again")


def test_a_stopped_process_answers_nobody(cluster: Cluster) -> None:
    worker = configure(cluster).worker()
    assert probe(worker, "/live")[0] == 200
    cluster.freeze(worker)
    with pytest.raises(OSError, match="timed out"):
        probe(worker, "/live", timeout=0.5)
    worker.tell_all(signal.SIGCONT)

    def answers() -> bool:
        try:
            return probe(worker, "/live")[0] == 200
        except OSError:  # what waited while it was stopped may be broken off
            return False

    until(answers, "live again")


def test_a_port_that_is_taken_ends_the_worker_with_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cluster.configure(plugins__hooks=["health"], plugins__options__health__port=port)
        worker = cluster.worker(wait=False)
        assert worker.wait(40) == 1
    assert f"Error: health: cannot listen at 127.0.0.1:{port}" in worker.text
    assert "Traceback" not in worker.text
