"""Celery's own tools, unmodified, before real workers of Umbel: inspect and control, on Redis and on RabbitMQ."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from celery import Celery
from celery.worker.control import Panel
from celery_receiver import until_it_answers
from cluster import Cluster, WorkerProcess, until
from servers.proxy import Proxy

from umbel.worker.worker import Worker
from umbel_celery.commands import handlers

WORKER = "umbel@kit"
Fleet = Callable[..., Cluster]
TASK_INFO = {
    *("id", "name", "args", "kwargs", "type", "hostname", "time_start"),
    *("acknowledged", "delivery_info", "worker_pid"),
}


def ready(cluster: Cluster, app: Celery) -> WorkerProcess:
    """A worker that answers."""
    worker = cluster.worker()
    until_it_answers(app)
    return worker


def ask(app: Celery, what: str, *args: Any) -> Any:
    """What the worker answers to ``inspect``."""
    inspect = app.control.inspect([WORKER], timeout=10, limit=1)
    return getattr(inspect, what)(*args)[WORKER]


def tell(app: Celery, what: str, **arguments: Any) -> Any:
    """What the worker answers to ``control``."""
    (reply,) = app.control.broadcast(what, arguments, reply=True, destination=[WORKER], timeout=10, limit=1)
    return reply[WORKER]


def test_inspect(fleet: Fleet, app: Celery, tools_url: str, tmp_path: Path) -> None:
    cluster = fleet(tools_url, worker__concurrency=1)
    worker = ready(cluster, app)
    gate = tmp_path / "gate"
    running, waiting = cluster.send("gated", str(gate), "ü"), cluster.send("gated", str(gate))
    (active,) = until(lambda: ask(app, "active"), "the task runs")
    assert active.keys() == TASK_INFO
    assert (active["id"], active["name"], active["hostname"], active["acknowledged"]) == (
        *(running.id, "shop.gated", WORKER),
        False,
    )
    assert active["worker_pid"] == worker.pid
    assert time.time() - 60 < active["time_start"] <= time.time()
    assert active["args"] == repr((str(gate), "ü"))
    assert active["delivery_info"] == {"exchange": "", "routing_key": "celery", "priority": 0, "redelivered": False}
    assert ask(app, "query_task", [running.id])[running.id][0] == "active"
    for reserved in ask(app, "reserved"):
        assert reserved.keys() == TASK_INFO
        assert (reserved["id"], reserved["worker_pid"]) == (waiting.id, None)
    assert ask(app, "scheduled") == []
    gate.touch()
    assert waiting.get(timeout=30) is None
    # A result can be read before its task is counted.
    stats = until(lambda: (told := ask(app, "stats"))["total"] == {"shop.gated": 2} and told, "both are counted")
    assert (stats["pool"]["max-concurrency"], stats["pid"]) == (1, worker.pid)
    assert int(stats["clock"]) > 0
    assert stats["broker"]["transport"] in ("redis", "amqp")
    (queue,) = ask(app, "active_queues")
    assert (queue["name"], queue["routing_key"], queue["exchange"]["type"]) == ("celery", "celery", "direct")
    # What Flower looks up without a default.
    assert {
        "exclusive",
        "durable",
        "no_ack",
        "alias",
        "queue_arguments",
        "binding_arguments",
        "auto_delete",
    } < queue.keys()
    registered = ask(app, "registered")
    assert "shop.add" in registered
    assert "shop.rated [rate_limit=10/s]" in registered
    assert ask(app, "conf")["task_default_queue"] == "celery"
    assert WORKER in ask(app, "report")["ok"]
    assert ask(app, "clock")["clock"] > int(stats["clock"])


def test_control(fleet: Fleet, app: Celery, tools_url: str, tmp_path: Path) -> None:
    cluster = fleet(tools_url)
    worker = ready(cluster, app)
    assert tell(app, "pool_grow", n=2) == {"ok": "pool will grow"}
    assert ask(app, "stats")["pool"]["max-concurrency"] == 4
    assert tell(app, "pool_shrink", n=1) == {"ok": "pool will shrink"}
    assert ask(app, "stats")["pool"]["max-concurrency"] == 3
    assert "1 slot" in tell(app, "pool_shrink", n=3)["error"]

    assert "ok" in tell(app, "add_consumer", queue="other")
    assert "already" in tell(app, "add_consumer", queue="other")["ok"]
    assert cluster.send("add", 1, 2, queue="other").get(timeout=30) == 3
    assert "ok" in tell(app, "cancel_consumer", queue="other")
    assert [queue["name"] for queue in ask(app, "active_queues")] == ["celery"]

    assert tell(app, "rate_limit", task_name="shop.add", rate_limit="5/m") == {"ok": "new rate limit set successfully"}
    assert "shop.add [rate_limit=5/m]" in ask(app, "registered")
    assert "disabled" in tell(app, "rate_limit", task_name="shop.add", rate_limit="0")["ok"]
    assert tell(app, "rate_limit", task_name="none", rate_limit="5/m") == {"error": "unknown task"}
    assert "error" in tell(app, "rate_limit", task_name="shop.add", rate_limit="often")
    assert "threads" in tell(app, "time_limit", task_name="shop.add", hard=5)["error"]

    app.control.revoke("never-to-run")
    until(lambda: ask(app, "revoked") == ["never-to-run"], "the revocation arrives")
    assert cluster.send("add", 1, 2, task_id="never-to-run").state in ("PENDING", "REVOKED")
    until(lambda: cluster.app.result("never-to-run").state == "REVOKED", "the task is not run")
    assert tell(app, "revoke", task_id=["a", "b"], terminate=True) == {"ok": "terminate: tasks unknown"}
    answer = tell(app, "revoke_by_stamped_headers", headers={"tenant": ["acme"]})
    assert answer == {"ok": "headers {'tenant': ['acme']} flagged as revoked, but not terminated"}
    cluster.send("add", 1, 2, task_id="stamped", stamped_headers=["tenant"], stamps={"tenant": "acme"})
    until(lambda: cluster.app.result("stamped").state == "REVOKED", "the stamped task is not run")

    assert tell(app, "enable_events") == {"ok": "task events enabled"}
    assert tell(app, "enable_events") == {"ok": "task events already enabled"}
    assert tell(app, "disable_events") == {"ok": "task events disabled"}
    assert "nonsense" in tell(app, "nonsense")["error"]
    assert "error" in tell(app, "add_consumer")
    assert tell(app, "autoscale", max=5, min=4) == {"ok": "autoscale now max=5 min=4"}
    until(lambda: ask(app, "stats")["autoscaler"] == {"min": 4, "max": 5, "current": 4}, "it keeps to its bounds")
    assert tell(app, "autoscale", max=6) == {"ok": "autoscale now max=6 min=4"}
    assert "between 4 and 3" in tell(app, "autoscale", max=3)["error"]
    assert "autoscale" in tell(app, "pool_grow", n=1)["error"]
    assert "rusage" in tell(app, "memsample")["error"]
    assert app.control.ping(destination=["another@kit"], timeout=0.5) == []
    assert app.control.ping(timeout=5, limit=1, pattern="umbel@*", matcher="glob") == [{WORKER: {"ok": "pong"}}]
    app.control.shutdown(destination=[WORKER])
    assert worker.wait(20) == 0


def test_every_command_of_celerys_is_answered_or_refused_by_name() -> None:
    answered = handlers(cast("Worker", SimpleNamespace(operations=None)), cast("Any", None))
    assert Panel.data.keys() <= answered.keys()


def test_a_terminated_task_and_time_limits(fleet: Fleet, redis_url: str, tmp_path: Path) -> None:
    """With a pool that can do both."""
    cluster = fleet(worker__pool="prefork")
    with Celery("peer", broker=redis_url, set_as_current=False) as app:
        ready(cluster, app)
        assert tell(app, "time_limit", task_name="shop.gated", hard=60, soft=50) == {
            "ok": "time limits set successfully"
        }
        assert "error" in tell(app, "time_limit", task_name="shop.gated", hard=5, soft=50)
        sent = cluster.send("gated", str(tmp_path / "never"))
        until(lambda: ask(app, "active"), "the task runs")
        assert tell(app, "terminate", task_id=sent.id, signal="SIGTERM") == {"ok": f"terminate: {sent.id}"}
        until(lambda: sent.state == "REVOKED", "it is ended")


@pytest.mark.parametrize("tools_url", ["redis"], indirect=True)
def test_a_new_worker_learns_what_is_revoked(fleet: Fleet, app: Celery, tools_url: str) -> None:
    cluster = fleet(tools_url)
    ready(cluster, app)
    app.control.revoke(["x", "y"])
    until(lambda: ask(app, "revoked"), "the first worker knows")
    cluster.configure(**{**_flat(cluster.settings), "worker__name": "second@kit"})
    cluster.worker()
    inspect = app.control.inspect(["second@kit"], timeout=5, limit=1)
    until(lambda: (inspect.revoked() or {}).get("second@kit") == ["x", "y"], "the second worker knows")
    hello = ask(app, "hello", "new@kit", {"z": [1.0, "z"]})
    assert sorted(hello["revoked"]) == ["x", "y", "z"]


def test_a_lost_connection_is_made_again_and_the_worker_does_not_notice(
    fleet: Fleet, tools_url: str, make_proxy: Callable[[int], Proxy]
) -> None:
    proxy = make_proxy(int(tools_url.rpartition(":")[2].partition("/")[0]))
    through = proxy.through(tools_url)
    cluster = fleet(plugins__options__celery__broker=through)
    with Celery("peer", broker=tools_url, set_as_current=False) as app:
        worker = ready(cluster, app)
        proxy.refuse()
        assert proxy.reset() > 0
        assert cluster.send("add", 1, 2).get(timeout=30) == 3
        worker.logged("Celery's tools cannot see this worker")
        assert not app.control.ping(timeout=0.5)
        proxy.heal()
        until_it_answers(app)
        assert worker.end() == 0
        assert "Traceback" not in worker.text


def test_a_broker_without_celerys_tools_is_refused_at_the_start(fleet: Fleet, tmp_path: Path) -> None:
    cluster = fleet(broker__url=f"sqlite:///{tmp_path}/b.sqlite3")
    done = cluster.umbel("worker")
    assert done.returncode != 0
    assert "[plugins.options.celery]" in done.stderr + done.stdout


def _flat(settings: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{path}{key}__") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat
