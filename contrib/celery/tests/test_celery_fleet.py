"""One fleet: workers and clients of Celery and of Umbel, on the same lists and the same results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery
from cluster import Cluster, until
from servers.redis import RedisServer

PEER = """
import os, pathlib, time
from celery import Celery

app = Celery("peer", broker=os.environ["URL"], backend=os.environ["URL"], set_as_current=False)
app.conf.update(
    task_acks_late=True,
    broker_connection_retry_on_startup=True,
    worker_prefetch_multiplier=1,
    broker_transport_options={
        "visibility_timeout": 3, "unacked_restore_interval": 0.5, "unacked_restore_throttle": 1,
    },
)

@app.task(name="shop.add")
def add(x, y):
    return x + y

@app.task(name="shop.fail")
def fail(text):
    raise ValueError(text)

@app.task(name="shop.gated")
def gated(gate, value=None):
    pathlib.Path(gate + ".started").touch()
    while not os.path.exists(gate):
        time.sleep(0.01)
    return value
"""
OPTIONS = {"broker__options__visibility_timeout": 3, "broker__lease": 1.5, "worker__concurrency": 1}


@pytest.fixture
def peer(tmp_path: Path, redis_url: str) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start Celery's own worker, alone in a process."""
    (tmp_path / "peer.py").write_text(PEER)
    started = []

    def start() -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "peer",
            "worker",
            "--pool=solo",
            "-n",
            "peer@kit",
            "-l",
            "INFO",
        ]
        with (tmp_path / "peer.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=tmp_path, stdout=log, stderr=log, env={**os.environ, "URL": redis_url}
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(10)
    if started:
        print((tmp_path / "peer.log").read_text())


def test_celerys_client_and_our_worker(
    fleet: Callable[..., Cluster], client: Celery, redis_server: RedisServer, redis_url: str
) -> None:
    fleet(results__url=redis_url, **OPTIONS).worker()
    assert client.send_task("shop.add", (2, 3)).get(timeout=30) == 5
    assert client.send_task("shop.add", (2, 3), priority=9).get(timeout=30) == 5
    with pytest.raises(ValueError, match="ü"):
        client.send_task("shop.fail", ("ü",)).get(timeout=30)
    database = int(redis_url.rpartition("/")[2])
    due = time.time() + 4.0
    later = client.send_task("shop.add", (2, 4), countdown=4.0)
    until(lambda: redis_server.command("ZCARD", "_umbel.delayed.celery", database=database), "it waits in the broker")
    assert later.get(timeout=30) == 6
    assert time.time() >= due
    for key in ("unacked", "unacked_index", "_umbel.claims", "_umbel.leases"):
        until(lambda key=key: not redis_server.command("EXISTS", key, database=database), f"nothing is left in {key}")


def test_our_client_and_celerys_worker(
    fleet: Callable[..., Cluster], peer: Callable[[], subprocess.Popen[bytes]], redis_url: str
) -> None:
    cluster = fleet(results__url=redis_url, broker__options__eta_queues=["celery"])
    peer()
    assert cluster.send("add", 2, 3).get(timeout=20) == 5
    assert cluster.send("add", 2, 3, countdown=0.5).get(timeout=30) == 5
    with pytest.raises(ValueError, match="bad"):
        cluster.send("fail", "bad").get(timeout=30)


@pytest.mark.slow
def test_what_a_killed_worker_held_is_done_by_one_of_the_other_kind(
    fleet: Callable[..., Cluster],
    peer: Callable[[], subprocess.Popen[bytes]],
    client: Celery,
    redis_url: str,
    tmp_path: Path,
) -> None:
    cluster = fleet(results__url=redis_url, **OPTIONS)
    celerys, gate = peer(), tmp_path / "gate"
    by_celery = client.send_task("shop.gated", (str(gate), "first"))
    until((tmp_path / "gate.started").exists, "Celery's worker has begun")
    celerys.send_signal(signal.SIGKILL)
    celerys.wait(10)
    ours = cluster.worker()
    cluster.ledger.wait_start(by_celery.id, timeout=30)
    ours.kill_all()
    peer()
    gate.touch()
    assert by_celery.get(timeout=40) == "first"
    assert "received" in json.dumps((tmp_path / "peer.log").read_text())
