"""A chord of very many members, whose workers are killed all the time; and what its sender needs of memory and network."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from canvas_fleet import PAIRS, Fleet, fleet, shop_of, shown  # noqa: F401  # a fixture among them
from cluster import FULL, Cluster, cluster, until  # noqa: F401  # a fixture, that the one above needs
from servers.redis import RedisServer

from umbel import chain, group

MEMBERS = 100_000 if FULL else 1000
STREAMED = 100_000 if FULL else 10_000
GROWTH = 3 * 2**20
"""Bytes; a member that is kept costs more than five hundred."""

STREAMING = """
import sys
from pathlib import Path

import canvas_shop
from umbel import group

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def members(number):
    for at in range(number):
        if at == number // 10:
            print(resident(), flush=True)
        yield canvas_shop.double.s(at)

(group(members(int(sys.argv[1]))) | canvas_shop.total.s()).apply_async()
print(resident())
"""


@pytest.mark.slow
@pytest.mark.timeout(700 if FULL else 300)
@pytest.mark.parametrize("fleet", PAIRS if FULL else [("sqlite", "redis")], indirect=True, ids="-".join)
def test_f10_a_great_chord_calls_back_once_while_workers_are_killed(fleet: Fleet) -> None:  # noqa: F811  # the fixture
    chance = random.Random(7)
    fleet.environment["UMBEL_WORKER__PREFETCH"] = "100"  # what a killed worker held is started few at a time
    for _ in range(4 if FULL else 2):
        fleet.worker()
    for worker in [*fleet.workers.values()]:
        worker.wait_ready()
    begun = time.monotonic()
    with fleet.killing(chance, every=(0.5, 1.5), most=150 if FULL else 2):
        sent = (group(fleet.shop.double.s(number) for number in range(MEMBERS)) | fleet.shop.total.s()).apply_async()
        until(lambda: sum(fleet.depth()) < MEMBERS // 20, "nearly all members have ended", timeout=540 if FULL else 120)
    with fleet.killing(chance, every=(0.5, 1.5), most=30 if FULL else 1):
        fleet.wait_until_over([sent.workflow], timeout=120)
    assert sent.get(timeout=30) == MEMBERS * (MEMBERS - 1)
    fleet.wait_until_idle(timeout=120)
    bodies = fleet.lines("body")
    assert {line["value"] for line in bodies} == {MEMBERS}
    fleet.check_starts({"body": bodies})
    print(shown({"members": MEMBERS, "kills": len(fleet.kills), "seconds": round(time.monotonic() - begun, 1)}))
    fleet.shop.start.delay(50)
    assert fleet.app.result("from within").get(timeout=60) == 50 * 49, "a chord that a task has sent"


@pytest.mark.slow
@pytest.mark.timeout(700 if FULL else 300)
@pytest.mark.parametrize("fleet", [("redis", "redis")], indirect=True, ids="-".join)  # a file has a cache of its own
def test_a_sender_keeps_none_of_the_members_that_it_streams(fleet: Fleet) -> None:  # noqa: F811  # the fixture
    script = fleet.cluster.folder / "streaming.py"
    script.write_text(STREAMING)
    done = fleet.cluster.run(str(script), str(STREAMED), timeout=300)
    assert done.returncode == 0, done.stderr
    early, late = map(int, done.stdout.split())
    assert fleet.depth()[0] == STREAMED
    assert late - early < GROWTH, f"{(late - early) / STREAMED:.0f} bytes for each member"
    print(shown({"members": STREAMED, "resident": early, "growth": late - early}))


@pytest.mark.slow
@pytest.mark.timeout(700 if FULL else 300)
def test_a_chain_of_chords_takes_bytes_on_the_wire_linear_in_its_size(
    cluster: Cluster,  # noqa: F811  # the fixture
    make_redis: Callable[..., RedisServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that the server hears, from the sending to the end: the messages, the graph, the marks, the results."""
    server = make_redis()
    numbers, width = ((10, 20, 50), 50) if FULL else ((2, 4, 10), 12)
    with shop_of(cluster, monkeypatch, broker__url=server.url, results__url=server.url) as shop:
        cluster.worker()
        heard = [_heard(server, shop, number, width) for number in (1, *numbers)][1:]  # after what is loaded once
    (few, some, many), (first, second, third) = heard, numbers
    slopes = (some - few) / (second - first), (many - some) / (third - second)
    print(shown({"chords": numbers, "width": width, "bytes": heard, "bytes for each more": slopes}))
    # What a worker asks its store and broker between the tasks is part of it, and takes longer on a busy machine.
    assert abs(slopes[1] - slopes[0]) < (0.1 if FULL else 0.25) * slopes[0], "each chord more costs the same"


def _heard(server: RedisServer, shop: Any, chords: int, width: int) -> int:
    """Bytes that the server has got while a chain of so many chords of that width was sent and run."""
    before = _bytes_in(server)
    steps: list[Any] = []
    for _ in range(chords):
        steps += [group([shop.identity.si(n) for n in range(width)]), shop.identity.si("body")]
    sent = chain(*steps).apply_async()
    assert sent.get(timeout=300) == "body"
    return _bytes_in(server) - before


def _bytes_in(server: RedisServer) -> int:
    return int(server.command("INFO", "stats")["total_net_input_bytes"])
