"""A worker that has nothing to do leaves its servers alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from cluster import Cluster
from servers.redis import RedisServer

SECONDS = 10.0
SENT, CARRIED_OUT = 2.0, 12.0
"""Commands a second, at most: sent by an idle worker; and carried out, those of its scripts among them."""


@pytest.mark.slow
def test_an_idle_worker_asks_its_broker_and_its_store_seldom(
    cluster: Cluster, make_redis: Callable[..., RedisServer]
) -> None:
    """What it waits for comes to it. It looks for what it may not have heard: revocations, chords that nobody fires."""
    server = make_redis()
    cluster.configure(broker__url=server.url, results__url=server.url)
    cluster.worker()
    assert cluster.send("note", 1).get(timeout=30) == 1
    cluster.app.close()

    def counts() -> tuple[int, int]:
        calls = {
            name.removeprefix("cmdstat_"): one["calls"] for name, one in server.command("INFO", "commandstats").items()
        }
        sent = sum(calls.get(name, 0) for name in ("evalsha", "eval", "blpop", "ping", "publish"))
        return sent, sum(calls.values())

    time.sleep(1)
    before = counts()
    time.sleep(SECONDS)
    sent, carried_out = (now - then for now, then in zip(counts(), before, strict=True))
    print(f"{sent / SECONDS:.2f} commands a second, {carried_out / SECONDS:.2f} with those of scripts")
    assert sent / SECONDS <= SENT
    assert carried_out / SECONDS <= CARRIED_OUT
    assert cluster.workers[0].running
