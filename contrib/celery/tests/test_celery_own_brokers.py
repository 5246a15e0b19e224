"""Celery's tools before workers on Umbel's own brokers, streams of Redis and queues of RabbitMQ, with the listener on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from celery import Celery
from celery_receiver import Monitor, until_it_answers
from cluster import Cluster, until

WORKER = "umbel@kit"
Fleet = Callable[..., Cluster]


def test_inspect_and_control(fleet: Fleet, app: Celery, tools_url: str, tmp_path: Path) -> None:
    cluster = fleet(broker__url=tools_url)
    worker = cluster.worker()
    until_it_answers(app)
    inspect = app.control.inspect([WORKER], timeout=10, limit=1)
    gate = tmp_path / "gate"
    running = cluster.send("gated", str(gate))
    (active,) = until(lambda: inspect.active()[WORKER], "the task runs")
    assert (active["id"], active["name"], active["hostname"]) == (running.id, "shop.gated", WORKER)
    assert [queue["name"] for queue in inspect.active_queues()[WORKER]] == ["celery"]
    assert "shop.add" in inspect.registered()[WORKER]
    assert inspect.stats()[WORKER]["pid"] == worker.pid
    gate.touch()
    assert running.get(timeout=20) is None

    (reply,) = app.control.add_consumer("other", destination=[WORKER], reply=True, timeout=10, limit=1)
    assert "ok" in reply[WORKER]
    assert cluster.send("add", 1, 2, queue="other").get(timeout=20) == 3
    app.control.revoke("never-to-run")
    until(lambda: "never-to-run" in inspect.revoked()[WORKER], "the revocation arrives")
    cluster.send("add", 1, 2, task_id="never-to-run")
    until(lambda: cluster.app.result("never-to-run").state == "REVOKED", "the task is not run")
    app.control.shutdown(destination=[WORKER])
    assert worker.wait(20) == 0
    assert "Traceback" not in worker.text


def test_a_worker_on_a_socket_is_seen_through_it(fleet: Fleet, make_redis: Callable[..., object]) -> None:
    server = make_redis()
    socket = server.socket  # type: ignore[attr-defined]  # a server of the tests
    cluster = fleet(broker__url=f"redis+socket://{socket}?virtual_host=2")
    cluster.worker()
    with Celery("peer", broker=f"redis+socket://{socket}?virtual_host=2", set_as_current=False) as app:
        until_it_answers(app)
        assert cluster.send("add", 1, 2).get(timeout=20) == 3


def test_events_are_heard(fleet: Fleet, app: Celery, tools_url: str, monitor: Monitor) -> None:
    cluster = fleet(broker__url=tools_url)
    cluster.worker()
    with monitor:
        assert app.control.enable_events(reply=True, timeout=10, limit=1) == [{WORKER: {"ok": "task events enabled"}}]
        sent = cluster.send("add", 1, 2)
        monitor.wait("task-succeeded", sent.id)
    assert monitor.story(sent.id) == ["task-received", "task-started", "task-succeeded"]
