"""Celery's tools before workers on Umbel's own brokers, streams of Redis and queues of RabbitMQ, with the listener on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery
from cluster import Cluster, until

WORKER = "umbel@kit"
Fleet = Callable[..., Cluster]


def test_inspect_and_control(fleet: Fleet, app: Celery, tools_url: str, tmp_path: Path) -> None:
    cluster = fleet(broker__url=tools_url)
    worker = cluster.worker()
    until(lambda: app.control.ping(timeout=1, limit=1), "the worker answers")
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
        until(lambda: app.control.ping(timeout=1, limit=1), "the worker answers")
        assert cluster.send("add", 1, 2).get(timeout=20) == 3


@pytest.mark.parametrize("tools_url", ["redis", "amqp"], indirect=True)
def test_events_are_heard(fleet: Fleet, app: Celery, tools_url: str) -> None:
    cluster = fleet(broker__url=tools_url)
    cluster.worker()
    until(lambda: app.control.ping(timeout=1, limit=1), "the worker answers")
    app.control.enable_events()
    heard: list[tuple[str, str]] = []
    with app.connection() as connection:
        receiver = app.events.Receiver(
            connection, handlers={"*": lambda event: heard.append((event["type"], event.get("uuid", "")))}
        )

        def after_a_task() -> bool:
            sent = cluster.send("add", 1, 2)
            sent.get(timeout=20)
            for _ in range(20):
                if ("task-succeeded", sent.id) in heard:
                    return True
                try:
                    receiver.capture(limit=1, timeout=0.5, wakeup=False)
                except (TimeoutError, OSError):
                    continue
            return False

        until(after_a_task, "its end is told", timeout=60)
    assert {"task-received", "task-started", "task-succeeded"} <= {kind for kind, _ in heard}
