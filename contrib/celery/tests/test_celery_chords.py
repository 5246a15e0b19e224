"""Chords over both kinds of workers: Celery's in Celery's form, Umbel's sent in that form, bodies on either side."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError
from cluster import Cluster
from redis import Redis

import umbel
from umbel import errors
from umbel_celery.chords import send

PEER = """
import os
from celery import Celery

app = Celery("peer", broker=os.environ["URL"], backend=os.environ["URL"], set_as_current=False)
app.conf.update(task_acks_late=True, broker_connection_retry_on_startup=True)

@app.task(name="shop.add")
def add(x, y):
    return x + y

@app.task(name="shop.note")
def note(value=None):
    return value

@app.task(name="shop.fail")
def fail(text):
    raise ValueError(text)
"""
OURS, THEIRS = "ours", "celery"
"""Queues: Umbel's worker has the one, Celery's the other."""


@pytest.fixture
def mixed(fleet: Callable[..., Cluster], tmp_path: Path, redis_url: str) -> Iterator[Cluster]:
    """One worker of each kind."""
    cluster = fleet(results__url=redis_url, worker__queues=[OURS], broker__options__eta_queues=[THEIRS])
    (tmp_path / "peer.py").write_text(PEER)
    command = [sys.executable, "-m", "celery", "-A", "peer", "worker", "--pool=solo", "-n", "peer@kit"]
    command += ["--without-gossip", "--without-mingle", "-l", "INFO"]
    with (tmp_path / "peer.log").open("wb") as log:
        peer = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env={**os.environ, "URL": redis_url})
    try:
        cluster.worker()
        yield cluster
    finally:
        peer.kill()
        peer.wait(10)
        print((tmp_path / "peer.log").read_text())


def test_chords_over_both(mixed: Cluster, client: Celery, redis_url: str) -> None:
    sides = [OURS, THEIRS]

    def theirs(name: str, *args: Any, queue: str) -> Any:
        return client.signature(name, args, queue=queue)

    for body in sides:
        header = [theirs("shop.add", n, n, queue=sides[n % 2]) for n in range(6)]
        assert chord(header, theirs("shop.note", queue=body), app=client)().get(timeout=20) == [0, 2, 4, 6, 8, 10]
        steps = [theirs("shop.add", 1, 1, queue=THEIRS), theirs("shop.add", 5, queue=OURS)]
        header = [chain(*steps, app=client), theirs("shop.add", 1, 2, queue=THEIRS)]
        assert chord(header, theirs("shop.note", queue=body), app=client)().get(timeout=20) == [7, 3]
        for failing in sides:
            header = [theirs("shop.add", 1, 1, queue=sides[0]), theirs("shop.fail", "bad", queue=failing)]
            failed = chord(header, theirs("shop.note", queue=body), app=client)()
            with pytest.raises(ChordError, match=r"raised ValueError\('bad'\)"):
                client.AsyncResult(failed.id).get(timeout=20)
    gone, pairs = datetime.now(UTC) - timedelta(hours=1), list(product(sides, sides))
    revoked = {pair: f"revoked-{'-'.join(pair)}" for pair in pairs}
    assert len(client.control.revoke(list(revoked.values()), reply=True, timeout=10, limit=2)) == 2
    for body, side in pairs:
        for called_off in ({"expires": gone}, {"task_id": revoked[body, side]}):
            header = [theirs("shop.add", 1, 1, queue=sides[0]), theirs("shop.add", 1, 1, queue=side).set(**called_off)]
            failed = chord(header, theirs("shop.note", queue=body), app=client)()
            with pytest.raises(ChordError, match=r"TaskRevoked\w*\('(expired|revoked)'\)"):
                client.AsyncResult(failed.id).get(timeout=20)
    members = [theirs("shop.add", 1, queue=side) for side in sides]
    middle = chain(
        theirs("shop.add", 1, 1, queue=OURS), group(members, app=client), theirs("shop.note", queue=OURS), app=client
    )
    assert middle().get(timeout=20) == [3, 3]

    app = mixed.app
    for body in sides:
        ours = [app.signature("shop.add", (n, n)).set(queue=sides[n % 2]) for n in range(6)]
        last = app.signature("shop.note").set(queue=body)
        assert send(app, umbel.chord(ours, last)).get(timeout=20) == [0, 2, 4, 6, 8, 10]
        steps = [app.signature("shop.add", (1, 1)).set(queue=OURS), app.signature("shop.add", (5,)).set(queue=THEIRS)]
        ours = [umbel.chain(*steps), app.signature("shop.fail", ("bad",)).set(queue=body)]  # type: ignore[list-item]  # both are calls
        with pytest.raises(errors.ChordError, match=r"raised ValueError\('bad'\)"):
            send(app, umbel.chord(ours, last)).get(timeout=20)

    with Redis.from_url(
        redis_url, decode_responses=True
    ) as server:  # of chords that have failed, Celery deletes nothing
        left = {key: server.ttl(key) for key in server.scan_iter("celery-taskset-meta-*")}
    assert min(left.values()) > 0, "what is left expires"


def test_a_chord_in_celerys_form_is_of_tasks_and_chains(fleet: Callable[..., Cluster], redis_url: str) -> None:
    app = fleet(results__url=redis_url).app
    add, note = app.signature("shop.add", (1, 2)), app.signature("shop.note")
    for header, body, why in (
        ([umbel.group([add])], note, "not a group"),
        ([add], umbel.chain(note, note), "not a chain"),
        ([], note, "one member"),
    ):
        with pytest.raises(errors.NotSupported, match=why):
            send(app, umbel.chord(header, body))  # type: ignore[arg-type]  # calls of several kinds
