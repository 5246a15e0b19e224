"""What networks do to the connections between workers and their broker, again and again."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

import pytest
from attrs import frozen
from cluster import WorkerProcess, until
from fleet import FULL, Fleet, descriptors, rss
from servers.proxy import CLIENT, SERVER, Proxy

CYCLES = 100 if FULL else 7
BLACK_HOLE = 5.0 if FULL else 1.5
WORKERS = 2
TASKS = 40
SECONDS = 0.02
"""Each cycle has work for half a second: the fault comes in the middle of it."""
GROWTH = 24.0
"""MiB that a worker may grow by."""


def _reset(proxy: Proxy, chance: random.Random) -> None:
    proxy.reset()


def _black_hole(proxy: Proxy, chance: random.Random) -> None:
    proxy.stall()
    time.sleep(BLACK_HOLE)
    proxy.heal()


def _dead_server(proxy: Proxy, chance: random.Random) -> None:
    """The workers believe in connections of which the server knows nothing."""
    proxy.half_open(CLIENT)


def _dead_client(proxy: Proxy, chance: random.Random) -> None:
    """The server believes in workers that have lost their connections."""
    proxy.half_open(SERVER)


def _cut(proxy: Proxy, chance: random.Random) -> None:
    proxy.cut(chance.randint(1, 400), chance.choice((CLIENT, SERVER))).wait(5)


def _three_cuts(proxy: Proxy, chance: random.Random) -> None:
    for _ in range(3):
        _cut(proxy, chance)
        time.sleep(chance.uniform(0.1, 0.6))


FAULTS = (_reset, _black_hole, _dead_server, _dead_client, _cut, _three_cuts)


@frozen
class Measure:
    """What must not grow."""

    rss: float
    descriptors: int
    connections: int
    through_proxy: int
    """As the proxy counts them."""


def _measure(fleet: Fleet, proxy: Proxy, workers: list[WorkerProcess]) -> Measure:
    """Once the way is whole, and what the server still believed in is gone: the wanted consumers and subscriptions, no others."""
    proxy.heal()
    proxy.reset()
    for wanted, count in (("consumers", fleet.broker.consumers), ("subscribers", fleet.broker.subscribers)):
        until(lambda count=count: count() == WORKERS, f"{WORKERS} {wanted}", timeout=fleet.broker.resumes)  # type: ignore[misc]  # mypy cannot infer lambdas with defaults
    time.sleep(1)
    return Measure(
        rss=max(map(rss, workers)),
        descriptors=max(map(descriptors, workers)),
        connections=fleet.broker.connections(),
        through_proxy=proxy.live,
    )


@pytest.mark.slow
@pytest.mark.timeout(3600 if FULL else 300)
def test_work_goes_on_after_each_fault_of_the_network_and_nothing_grows(
    fleet: Fleet, make_proxy: Callable[[int], Proxy]
) -> None:
    """Each fault, and one at random again and again; what was sent before it is done in time after it."""
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(1 << 32))
    print(f"CHAOS_SEED={seed}")
    chance = random.Random(seed)
    proxy = make_proxy(fleet.broker.server.port)
    fleet.configure(worker__max_deliveries=50, worker__concurrency=1, **fleet.broker.hasty)
    workers = [fleet.worker(proxy=proxy) for _ in range(WORKERS)]
    faults = [*FAULTS, *chance.choices(FAULTS, k=CYCLES - len(FAULTS))]
    sent: list[str] = []
    took: dict[str, list[float]] = {}
    before = None
    for number, fault in enumerate(faults):
        sent += [task.id for task in fleet.send_many("note", [(n, SECONDS) for n in range(TASKS)])]
        time.sleep(chance.uniform(0.05, 0.4))
        fault(proxy, chance)
        healed = time.monotonic()
        proxy.heal()
        fleet.wait_done(timeout=fleet.broker.resumes)
        took.setdefault(fault.__name__, []).append(time.monotonic() - healed)
        if number == len(FAULTS) - 1:  # all that is made on first use has been made
            before = _measure(fleet, proxy, workers)
    after = _measure(fleet, proxy, workers)
    assert before is not None
    again = fleet.check_ledger(sent)
    for name, times in sorted(took.items()):
        print(f"{fleet.broker.name}: {len(times)} of {name}: done after {max(times):.1f} s at most")
    print(f"{fleet.broker.name}: {len(sent)} tasks, {again} started again, {before}, then {after}")
    assert after.rss - before.rss < GROWTH
    assert after.descriptors <= before.descriptors + 2
    assert after.connections <= before.connections + 2
    assert after.through_proxy <= before.through_proxy + 2
    for worker in workers:
        assert worker.end() == 0
