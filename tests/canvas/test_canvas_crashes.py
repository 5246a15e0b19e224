"""The crash between every two calls that a workflow makes, and servers and senders that die in the middle of one."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
from canvas_fleet import Fleet, Sent, fleet, fleet_between  # noqa: F401  # a fixture among them
from canvas_model import Tree, numbered
from canvas_work import POINTS
from cluster import FULL, Cluster, cluster, until  # noqa: F401  # a fixture, that the one above needs

from umbel.canvas.picture import listed
from umbel.canvas.results import workflow_result

SOME = ("join:after", "settle:before")
OK, RETRY, REPLACE, FAIL = (("task", kind, 0) for kind in ("ok", "retry", "replace_chord", "fail"))
TREE: Tree = ("chain", [("chord", [OK, RETRY, REPLACE], RETRY), ("group", [OK, OK]), REPLACE, OK])
WIDE: Tree = ("chain", [("group", [OK] * 40), ("group", [RETRY] * 40), ("chord", [OK, OK], OK)])
SAFE = [("sqlite", "sqlite")]
_MAKERS = {"redis": "make_redis", "amqp": "make_rabbitmq"}


@pytest.mark.slow
@pytest.mark.timeout(400 if FULL else 300)
@pytest.mark.parametrize("fleet", [*SAFE, ("redis", "redis")] if FULL else SAFE, indirect=True, ids="-".join)
def test_a_worker_killed_between_two_calls_of_a_workflow(fleet: Fleet) -> None:  # noqa: F811  # the fixture
    """One worker after the other dies at a place of its own, and the last, which lives, ends what they have begun."""
    sent = Sent(fleet)
    for number, point in enumerate(POINTS if FULL else SOME):
        sent.send([numbered(TREE)])
        flag = fleet.cluster.folder / f"crashed-{number}"
        name = fleet.worker(CANVAS_CRASH=point, CANVAS_CRASHED=str(flag))
        worker = fleet.workers.pop(name)
        until(lambda: not worker.running, f"worker {name} dies at {point}", timeout=60)  # noqa: B023  # waited for here
        fleet.kills[name] = (when := float(flag.read_text()), when + 1)
    fleet.worker()
    sent.wait(timeout=120)
    fleet.wait_until_idle(timeout=30)
    sent.check()


@pytest.mark.slow
@pytest.mark.timeout(400 if FULL else 300)
@pytest.mark.parametrize(
    ("broker", "store"),
    [("redis", "redis"), *([("redis", None), (None, "redis"), ("amqp", None)] if FULL else [])],
)
def test_servers_killed_in_the_middle(
    cluster: Cluster,  # noqa: F811  # the fixture
    broker: str | None,
    store: str | None,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broker and the store, one server or two, are killed while workflows run, and started again a second later."""
    servers: dict[str | None, Any] = {
        kind: request.getfixturevalue(_MAKERS[str(kind)])() for kind in {broker, store} - {None}
    }
    urls = {kind: server.url for kind, server in servers.items()}
    with fleet_between(cluster, monkeypatch, urls.get(broker), urls.get(store)) as fleet:  # noqa: F811  # one of its own
        sent = Sent(fleet)
        sent.send([numbered(WIDE) for _ in range(3)])
        fleet.worker(wait=True)
        until(lambda: len(fleet.lines("work")) > 30, "workflows run", timeout=60)
        for kind, server in servers.items():
            if kind == "amqp":
                server.sync()
            server.kill()
        time.sleep(1)
        for server in servers.values():
            server.start()
        sent.wait(timeout=120)
        fleet.wait_until_idle(timeout=60)
        sent.check()


STREAMING = """
import time

import canvas_shop
from umbel import group

def members():
    for at in range(10**6):
        if at == 2500:
            print("half", flush=True)
            time.sleep(600)
        yield canvas_shop.identity.s(at)

header = group(members()).on_error(canvas_shop.note.si(0, "group"))
(header | canvas_shop.note.s("body").link_error(canvas_shop.note.si(0, "error of the body"))).apply_async()
"""


@pytest.mark.slow
@pytest.mark.timeout(400 if FULL else 300)
@pytest.mark.parametrize("fleet", SAFE, indirect=True, ids="-".join)
def test_a_sender_killed_while_it_streams(fleet: Fleet) -> None:  # noqa: F811  # the fixture
    """The workflow that it leaves behind ends, its errbacks are told once, and its body is not started."""
    script = fleet.cluster.folder / "streaming.py"
    script.write_text(STREAMING)
    environment = {**fleet.cluster.env, **fleet.leases}
    sender = subprocess.Popen(
        [sys.executable, str(script)], env=environment, cwd=fleet.cluster.folder, stdout=subprocess.PIPE
    )
    assert sender.stdout is not None
    try:
        assert sender.stdout.readline() == b"half\n"
    finally:
        sender.kill()
        sender.wait(10)
        sender.stdout.close()
    ((_, workflow, _),) = listed(fleet.app)
    fleet.worker(wait=True)
    fleet.wait_until_over([workflow], timeout=120)
    fleet.wait_until_idle(timeout=60)
    told = [line["value"][-1] for line in fleet.lines("note")]
    assert sorted(told) == ["error of the body", "group"]
    handle = workflow_result(workflow, fleet.app)
    assert handle.state == "FAILURE"
    print(handle.result)
