"""Flower, unmodified, as a process: it sees a worker of Umbel, its queues and tasks, and its buttons work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, until
from servers.process import free_port

WORKER = "umbel@kit"


PEERS = """
from celery import Celery

app = Celery("peers", set_as_current=False)


@app.task(name="shop.add")
def add(x, y):
    pass
"""
"""Flower sets limits only of tasks that its own app names."""


class Flower:
    """Flower's HTTP API and pages."""

    def __init__(self, broker: str, folder: Path) -> None:
        self.log = folder / "flower.log"
        self._port = free_port()
        (folder / "peers.py").write_text(PEERS)
        options = ["--address=127.0.0.1", f"--port={self._port}"]
        command = [sys.executable, "-m", "celery", "-A", "peers", "-b", broker, "flower", *options]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=out, stderr=out, env={**os.environ, "FLOWER_UNAUTHENTICATED_API": "true"}
            )

    def call(self, path: str, data: dict[str, Any] | None = None) -> tuple[int, str]:
        """Status and text; with ``data``, of a POST."""
        body = None if data is None else urllib.parse.urlencode(data).encode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", body, timeout=15) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def get(self, path: str) -> Any:
        status, text = self.call(path)
        assert status == 200, (path, status, text)
        return json.loads(text)

    def press(self, path: str, **data: Any) -> str:
        """A button: its message."""
        status, text = self.call(path, data)
        assert status == 200, (path, status, text)
        return str(json.loads(text)["message"])

    def worker(self) -> dict[str, Any]:
        """What Flower knows of the worker, asked for anew."""
        found: dict[str, Any] = self.get(f"/api/workers?refresh=1&workername={WORKER}").get(WORKER, {})
        return found


@pytest.fixture
def flower(tools_url: str, tmp_path: Path) -> Iterator[Flower]:
    flower = Flower(tools_url, tmp_path)
    yield flower
    flower.process.terminate()
    flower.process.wait(20)
    print(flower.log.read_text())


def test_flower_sees_and_commands_a_worker(
    fleet: Callable[..., Cluster], tools_url: str, flower: Flower, tmp_path: Path
) -> None:
    cluster = fleet(tools_url, worker__pool="prefork", worker__concurrency=1)
    worker = cluster.worker()
    until(
        lambda: flower.call("/api/workers?status=1") == (200, json.dumps({WORKER: True})),
        "Flower sees it online",
        timeout=40,
    )

    known = until(lambda: (found := flower.worker()).get("stats") and found, "its figures")
    assert known["stats"]["pid"] == worker.pid
    assert [queue["name"] for queue in known["active_queues"]] == ["celery"]
    assert "shop.add" in known["registered"]

    # Flower's own request for events has arrived by now, or arrives within its five seconds.
    until(lambda: _seen(flower, cluster, "SUCCESS"), "a task that succeeded", every=0.5)
    failed = cluster.send("fail", "bad")
    task = until(lambda: _task(flower, failed.id, "FAILURE"), "the task that failed")
    assert (task["name"], task["worker"]) == ("shop.fail", WORKER)
    assert "bad" in task["exception"]

    gate = tmp_path / "gate"
    running = cluster.send("gated", str(gate))
    until(lambda: _task(flower, running.id, "STARTED"), "the task that runs")
    until(lambda: [each["id"] for each in flower.worker()["active"]] == [running.id], "the worker's active task")
    for page in (f"/worker/{WORKER}", "/workers", "/tasks", f"/task/{running.id}", f"/task/{failed.id}", "/broker"):
        status, text = flower.call(page)
        assert status == 200, (page, text)
    assert WORKER in flower.call(f"/worker/{WORKER}")[1]
    assert "shop.gated" in flower.call(f"/worker/{WORKER}")[1]

    flower.press(f"/api/worker/pool/grow/{WORKER}", n=2)
    until(lambda: flower.worker()["stats"]["pool"]["max-concurrency"] == 3, "two slots more")
    flower.press(f"/api/worker/pool/shrink/{WORKER}", n=1)
    until(lambda: flower.worker()["stats"]["pool"]["max-concurrency"] == 2, "one slot less")
    assert (
        flower.press("/api/task/rate-limit/shop.add", workername=WORKER, ratelimit="10/m")
        == "new rate limit set successfully"
    )
    assert "shop.add [rate_limit=10/m]" in flower.worker()["registered"]
    assert (
        flower.press("/api/task/timeout/shop.add", workername=WORKER, hard=60, soft=50)
        == "time limits set successfully"
    )
    assert "other" in flower.press(f"/api/worker/queue/add-consumer/{WORKER}", queue="other")
    assert sorted(queue["name"] for queue in flower.worker()["active_queues"]) == ["celery", "other"]
    assert "other" in flower.press(f"/api/worker/queue/cancel-consumer/{WORKER}", queue="other")
    assert [queue["name"] for queue in flower.worker()["active_queues"]] == ["celery"]
    status, text = flower.call(f"/api/worker/pool/restart/{WORKER}", {})
    assert (status, "Failed to restart" in text) == (403, True)
    flower.press(f"/api/worker/pool/autoscale/{WORKER}", min=1, max=2)
    assert flower.worker()["stats"]["autoscaler"]["max"] == 2

    flower.press(f"/api/task/revoke/{running.id}", terminate="true")
    until(lambda: running.state == "REVOKED", "the task that ran is ended")
    until(lambda: _task(flower, running.id, "REVOKED"), "and Flower knows it")
    flower.press(f"/api/worker/shutdown/{WORKER}")
    assert worker.wait(20) == 0
    until(lambda: flower.call("/api/workers?status=1") == (200, json.dumps({WORKER: False})), "Flower sees it offline")


def _seen(flower: Flower, cluster: Cluster, state: str) -> bool:
    cluster.send("add", 1, 1)
    return bool(flower.get(f"/api/tasks?state={state}"))


def _task(flower: Flower, id: str, state: str) -> Any:
    status, text = flower.call(f"/api/task/info/{id}")
    found = json.loads(text) if status == 200 else {}
    return found if found.get("state") == state else None
