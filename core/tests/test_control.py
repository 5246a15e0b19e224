"""Remote control: requests on one topic, replies on another, and nothing said there can stop a worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from umbel.errors import TaskRevoked
from umbel.model import Message
from umbel.protocol import make_headers
from umbel.worker.control import REQUESTS, ask

from .conftest import MakeApp
from .fakes import Fakes, Running, eventually, never, running


@pytest.fixture
def run(make_app: MakeApp, fakes: Fakes) -> Iterator[Running]:
    app = make_app({"worker.pool": "manual", "worker.name": "w1@here"})
    app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as worker:
        eventually(lambda: fakes.broker.topics.get(REQUESTS))
        yield worker


def request(run: Running, method: str, *, timeout: float = 5, to: str | None = "w1@here", **arguments: Any) -> Any:
    """What the worker answers."""
    app = run.worker.app
    asking = ask(app.gateway.transport, method, arguments, destination=[to] if to else None, timeout=timeout)  # type: ignore[attr-defined]  # a worker's gateway is local
    return app.runtime.call(asking, 10)


def say(run: Running, payload: bytes) -> None:
    """Broadcast anything to all workers."""
    transport: Any = run.worker.gateway.transport
    run.worker.app.runtime.call(transport.broadcast(REQUESTS, payload), 5)


def test_a_worker_answers_under_its_name(run: Running) -> None:
    assert request(run, "ping") == {"w1@here": {"ok": "pong"}}
    assert request(run, "registered") == {"w1@here": ["shop.job"]}
    assert request(run, "active_queues") == {"w1@here": [{"name": "default", "routing_key": "default"}]}


def test_stats_are_plain_data_about_the_worker(run: Running) -> None:
    stats = request(run, "stats")["w1@here"]
    assert (stats["total"], stats["held"], stats["stale"], stats["prefetch_count"]) == ({}, 0, 0, 2)
    assert stats["pool"]["implementation"] == "manual"


def test_active_shows_what_is_held_even_of_strangers(run: Running, fakes: Fakes) -> None:
    headers = {**make_headers("shop.job", "odd"), "argsrepr": b"\xff"}
    fakes.broker.add(Message(queue="default", headers=headers, body=b"[[], {}, {}]"))
    fakes.pool.job("odd")
    (shown,) = request(run, "active")["w1@here"]
    assert (shown["id"], shown["name"], shown["hostname"]) == ("odd", "shop.job", "w1@here")
    assert shown["delivery_info"]["routing_key"] == "default"


def test_a_task_is_revoked_from_afar(run: Running) -> None:
    answer = {"ok": "tasks a flagged as revoked", "running": [], "waiting": []}
    assert request(run, "revoke", task_id="a") == {"w1@here": answer}
    request(run, "revoke", task_id=["b", "c"])
    assert list(run.worker.operations.revoked) == ["a", "b", "c"]
    run.worker.app.tasks["shop.job"].apply_async(task_id="b")
    with pytest.raises(TaskRevoked):
        run.worker.app.result("b").get(5)


def test_a_worker_is_stopped_from_afar(run: Running) -> None:
    request(run, "shutdown", timeout=0.1)
    run.join()
    assert run.status == 0


def test_an_unknown_command_and_one_that_fails_are_answered_with_an_error(run: Running) -> None:
    assert request(run, "reboot") == {"w1@here": {"error": "unknown command 'reboot'"}}
    assert "error" in request(run, "revoke", task_id=3)["w1@here"]


@pytest.mark.parametrize(
    ("addressing", "answers"),
    [
        ({}, True),
        ({"destination": ["w1@here", "other"]}, True),
        ({"destination": ["other"]}, False),
        ({"pattern": "w*@here", "matcher": "glob"}, True),
        ({"pattern": "x*", "matcher": "glob"}, False),
        ({"pattern": r"w\d@.*", "matcher": "pcre"}, True),
        ({"pattern": "^x", "matcher": "pcre"}, False),
    ],
)
def test_only_who_is_addressed_obeys(run: Running, addressing: dict[str, Any], answers: bool) -> None:
    say(run, json.dumps({"method": "revoke", "arguments": {"task_id": "t"}, **addressing}).encode())
    if answers:
        eventually(lambda: "t" in run.worker.operations.revoked)
    else:
        assert never(lambda: "t" in run.worker.operations.revoked)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xff", b"[]", b"3", b"{}", b"[" * 100_000, b'{"method": "ping", "destination": 3}',
     b'{"method": "ping", "pattern": "(", "matcher": "pcre"}', b'{"method": "ping", "pattern": 3}',
     b'{"method": "revoke", "arguments": 3}', b'{"method": ["x"], "reply_to": 3}'],
)  # fmt: skip
def test_nothing_that_is_said_makes_a_worker_deaf(run: Running, payload: bytes) -> None:
    say(run, payload)
    assert request(run, "ping") == {"w1@here": {"ok": "pong"}}


def test_an_answer_from_nobody_is_empty(run: Running) -> None:
    assert request(run, "ping", to="nobody", timeout=0.05) == {}


def test_without_broadcast_there_is_no_remote_control_and_no_harm(make_app: MakeApp, fakes: Fakes) -> None:
    import attrs

    fakes.broker.capabilities = attrs.evolve(fakes.broker.capabilities, broadcast=False)
    with running(make_app(), fakes) as worker:
        assert fakes.broker.topics == {}
    assert worker.status == 0
    assert asyncio.iscoroutinefunction(ask)
