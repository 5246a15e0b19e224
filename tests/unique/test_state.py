"""What a record says of a task, from its sending to its end: never a state that was not, never one that is over."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cluster import Cluster

from umbel import Umbel
from umbel.errors import PublishRefused, ResultStoreUnavailable, SettingsError
from umbel.model import FINAL_STATES, Result
from umbel.ports.clock import VirtualClock
from umbel.ports.result_store import replaces
from umbel.protocol import order_of
from umbel.testing.harness import Harness, in_memory

NOON = 1_750_000_000.0


@contextmanager
def opened(app: Umbel, track: str = "submit", **settings: Any) -> Iterator[Harness]:
    with in_memory(app, clock=VirtualClock(NOON), settings={"results.track": track, **settings}) as harness:
        yield harness


@pytest.fixture
def app() -> Umbel:
    app = Umbel("shop")

    @app.task(name="shop.add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="shop.shy", ignore_result=True)
    def shy() -> None:
        """Leaves no trace."""

    @app.task(name="shop.flaky", bind=True, retry_delay=60, max_retries=20)
    def flaky(self: Any, failures: int) -> str:
        if self.request.retries < failures:
            raise self.retry(exc=ValueError(f"failure {self.request.retries + 1}"))
        return "at last"

    return app


# --- from sending on ------------------------------------------------------------------------------


def test_what_was_sent_is_pending_and_what_was_not_is_unknown(app: Umbel) -> None:
    with opened(app) as harness:
        sent = app.tasks["shop.add"].delay(1, 2)
        asent = asyncio.run(app.tasks["shop.add"].adelay(1, 2))
        many = app.tasks["shop.add"].map_delay([(1, n) for n in range(2500)], batch=1000)
        assert {handle.state for handle in (sent, asent, *many[::500])} == {"PENDING"}
        assert sent.record() is not None
        assert app.result("never sent").state == "UNKNOWN"
        with harness.worker():
            assert sent.get(timeout=30) == 3
            harness.run_until_idle(timeout=60)
        assert {handle.state for handle in many[::500]} == {"SUCCESS"}


@pytest.mark.parametrize("track", ["end", "start"])
def test_without_such_records_nobody_can_tell(app: Umbel, track: str) -> None:
    with opened(app, track) as harness:
        sent = app.tasks["shop.add"].delay(1, 2)
        assert sent.record() is None
        assert (sent.state, app.result("never sent").state) == ("PENDING", "PENDING")
        with harness.worker():
            sent.get(timeout=30)


def test_every_task_tells_that_it_has_started(app: Umbel) -> None:
    gate, inside = threading.Event(), threading.Event()

    @app.task(name="shop.stands")
    def stands() -> None:
        inside.set()
        assert gate.wait(10)

    with opened(app, "start") as harness, harness.worker():
        sent = stands.delay()
        assert inside.wait(10)
        assert (sent.state, sent.info["hostname"].startswith("umbel")) == ("STARTED", True)
        gate.set()
        sent.get(timeout=30)


def test_a_task_without_a_result_has_no_record_at_all(app: Umbel) -> None:
    with opened(app) as harness:
        sent = app.tasks["shop.shy"].delay()
        with harness.worker():
            harness.run_until_idle()
            assert sent.record() is None
            assert sent.state == "UNKNOWN"


def test_what_follows_from_a_task_is_pending_before_that_one_has_ended(app: Umbel) -> None:
    app.task(name="shop.later")(lambda _: None)
    with opened(app) as harness:
        link = app.tasks["shop.later"].signature((1,)).set(countdown=600, task_id="link")
        app.tasks["shop.add"].apply_async((1, 2), link=link)
        with harness.worker():
            harness.run_until_idle()
            assert app.result("link").state == "PENDING"


def test_a_record_of_what_waits_lasts_as_long_as_that(app: Umbel) -> None:
    with opened(app, **{"results.expires": 100.0}) as harness:
        later, now = (app.tasks["shop.add"].apply_async((1, 2), countdown=c) for c in (1000.0, 0.0))
        harness.clock.advance(101)
        assert (later.state, now.state) == ("PENDING", "UNKNOWN")
        harness.clock.advance(1000)
        assert later.state == "UNKNOWN"


def test_what_the_broker_refuses_was_never_pending(app: Umbel, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(app):

        def refuse(*_: Any) -> None:
            raise PublishRefused("no")

        monkeypatch.setattr(app.gateway, "publish", refuse)
        with pytest.raises(PublishRefused):
            app.tasks["shop.add"].apply_async((1, 2), task_id="refused")
        assert app.result("refused").state == "UNKNOWN"


def test_a_store_that_is_down_does_not_make_a_sent_task_look_unsent(
    app: Umbel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(app) as harness:

        async def down(_: Any) -> None:
            raise ResultStoreUnavailable("down")

        _ = app.gateway.reply_to
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(app.gateway.store, "put", down)  # type: ignore[attr-defined]  # a gateway of this process
            sent = app.tasks["shop.add"].delay(1, 2)
            asent = asyncio.run(app.tasks["shop.add"].adelay(1, 2))
        assert len(harness.published) == 2
        assert "are sent, and have no record of it: down" in caplog.text
        with harness.worker():
            assert [sent.get(timeout=30), asent.get(timeout=30)] == [3, 3]


def test_a_store_that_only_sends_results_cannot_keep_such_records() -> None:
    app = Umbel("shop", broker="memory://", results="rpc://", settings={"results.track": "submit"})
    with pytest.raises(SettingsError, match=r"\[results\] track = .submit. needs a store that keeps"):
        app.make_result_store()


# --- progress -------------------------------------------------------------------------------------


def test_progress_is_told_without_blocking_the_loop_of_others(app: Umbel) -> None:
    told, go = threading.Event(), threading.Event()

    @app.task(name="shop.walk", bind=True)
    async def walk(self: Any) -> None:
        await self.aupdate_state("PROGRESS", {"done": 1})
        told.set()
        assert await asyncio.to_thread(go.wait, 10)
        await self.aupdate_state("PROGRESS", {"done": 2})

    with opened(app) as harness, harness.worker():
        sent = walk.delay()
        assert told.wait(10)
        assert (sent.state, sent.info) == ("PROGRESS", {"done": 1})
        go.set()
        sent.get(timeout=30)


@pytest.mark.parametrize("state", [*sorted(FINAL_STATES), "UNKNOWN"])
def test_progress_tells_no_end(app: Umbel, state: str) -> None:
    task = app.task(name="shop.liar", bind=True)(lambda self: self.update_state(state))
    with opened(app) as harness, harness.worker(), pytest.raises(ValueError, match="is how a task ends"):
        task.delay().get(timeout=30)


# --- attempts -------------------------------------------------------------------------------------


def test_a_record_tells_every_attempt(app: Umbel) -> None:
    with opened(app, "end") as harness, harness.worker() as worker:
        sent = app.tasks["shop.flaky"].delay(2)
        harness.run_until_idle()
        (first,) = (sent.record() or {})["attempts"]
        assert (first["retries"], first["deliveries"], first["worker"]) == (0, 1, worker.name)
        assert first["error"] == "ValueError: failure 1"
        assert first["started"] <= first["ended"]
        harness.advance(120)
        assert sent.get(timeout=30) == "at last"
        attempts = (sent.record() or {})["attempts"]
        assert [each["error"] for each in attempts] == ["ValueError: failure 1", "ValueError: failure 2", None]
        assert attempts[2]["started"] > attempts[1]["ended"] > first["ended"]


def test_only_the_last_attempts_are_remembered(app: Umbel) -> None:
    with opened(app, "end") as harness, harness.worker():
        sent = app.tasks["shop.flaky"].delay(15)
        harness.advance(15 * 60)
        attempts = (sent.record() or {})["attempts"]
        assert [each["retries"] for each in attempts] == list(range(6, 16))


def test_a_task_that_was_tried_once_tells_no_attempts(app: Umbel) -> None:
    with opened(app, "end") as harness, harness.worker():
        sent = app.tasks["shop.add"].delay(1, 2)
        sent.get(timeout=30)
        assert "attempts" not in (sent.record() or {})


# --- never back -----------------------------------------------------------------------------------


def test_no_order_of_arrival_turns_a_state_back() -> None:
    """Every permutation of what is put of one task in its life ends in the same record."""
    life = [
        ("PENDING", 0, 0),
        ("STARTED", 0, 1),
        ("PROGRESS", 0, 1),
        ("STARTED", 0, 2),
        ("RETRY", 0, 511),
        ("STARTED", 1, 1),
        ("PROGRESS", 1, 1),
    ]
    orders = [order_of(*passage) for passage in life]
    assert orders == sorted(set(orders))
    records = [Result(task_id="a", state=s, document=b"", order=o) for (s, _, _), o in zip(life, orders, strict=True)]
    for permutation in itertools.permutations(records):
        known = permutation[0]
        for result in permutation[1:]:
            known = result if replaces(result, known) else known
        assert known is records[-1]
    final = Result(task_id="a", state="SUCCESS", document=b"")
    assert all(replaces(final, passing) and not replaces(passing, final) for passing in records)
    assert order_of("RETRY", 10**9) < 2**53, "a double holds it"


def test_a_state_that_comes_late_is_not_shown(app: Umbel) -> None:
    with opened(app) as harness, harness.worker():
        sent = app.tasks["shop.flaky"].delay(1)
        harness.run_until_idle()
        late = app.client.state_record(sent.id, "STARTED", None, {}, order=order_of("STARTED", 0, 1))
        app.gateway.put([late])
        app.gateway.put(app.client.pending(harness.published[:1]))
        assert sent.state == "RETRY"


# --- the command line -----------------------------------------------------------------------------


WALK = """
from pathlib import Path
from time import sleep
from umbel import Umbel

app = Umbel("walk")

@app.task(bind=True, max_retries=1, retry_delay=0.1)
def walk(self, fail=False):
    self.update_state("PROGRESS", {"done": 1, "of": 2})
    while not Path("go").exists():
        sleep(0.02)
    if fail:
        self.retry(exc=ValueError("lost the way"))
    return "there"
"""


def test_following_a_task_shows_it_to_its_end(cluster: Cluster) -> None:
    (cluster.folder / "walk.py").write_text(WALK)
    cluster.configure(app="walk", results__track="submit")
    sent, failing = (cluster.app.send_task("walk.walk", args) for args in ((), (True,)))
    command = [sys.executable, "-m", "umbel", "result", sent.id, "--follow", "--json", "--timeout", "60s"]
    with subprocess.Popen(command, cwd=cluster.folder, env=cluster.env, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        states = [json.loads(following.stdout.readline())]
        assert states[0]["status"] == "PENDING"
        cluster.worker()
        while states[-1]["status"] != "PROGRESS":
            states.append(json.loads(following.stdout.readline()))
        assert states[-1]["result"] == {"done": 1, "of": 2}
        (cluster.folder / "go").touch()
        states += [json.loads(line) for line in following.stdout]
    assert (states[-1]["status"], following.returncode) == ("SUCCESS", 0)
    assert [state["status"] for state in states if state["status"] != "STARTED"] == ["PENDING", "PROGRESS", "SUCCESS"]

    failed = cluster.umbel("result", failing.id, "--follow")
    assert failed.returncode == 1
    assert "FAILURE  ValueError: lost the way  (attempt 2)" in failed.stdout
    assert "ValueError: lost the way" in failed.stderr
    assert "RETRIES  DELIVERIES" in cluster.umbel("result", failing.id).stdout


def test_following_ends_when_its_time_is_over(cluster: Cluster) -> None:
    done = cluster.umbel("result", "nobody", "--follow", "--timeout", "100ms")
    assert (done.returncode, "has not ended after 0.1 s" in done.stderr) == (1, True)
    done = cluster.umbel("result", "nobody", "--timeout", "1s")
    assert (done.returncode, "--timeout is for --wait and --follow" in done.stderr) == (2, True)
