"""Workflows on real workers that are killed, on several brokers and stores."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import FULL, Cluster, cluster  # noqa: F401  # found by the line above; a fixture

from umbel import Umbel, chain, chord, group

MEMBERS = 100_000 if FULL else 1000
KILLS = 100 if FULL else 3
PAIRS = [("sqlite", "sqlite"), ("redis", "redis"), ("amqp", "sqlite")]
if FULL:
    PAIRS += [("sqlite", "redis"), ("redis", "sqlite"), ("amqp", "redis")]


@pytest.fixture
def fleet(
    cluster: Cluster,  # noqa: F811  # the fixture that was imported
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Cluster:
    """Not yet running: a broker and a store as ``request.param`` names them."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    broker, store = request.param
    settings: dict[str, Any] = {"app": "canvas_shop", "broker__lease": 2.0, "worker__max_deliveries": 10}
    urls = {"redis": "redis_url", "amqp": "rabbitmq_url"}
    if broker in urls:
        settings["broker__url"] = request.getfixturevalue(urls[broker])
    if store in urls:
        settings["results__url"] = request.getfixturevalue(urls[store])
    return cluster.configure(**settings)


@pytest.fixture
def shop(fleet: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The tasks, in this process."""
    monkeypatch.setenv("LEDGER", str(fleet.ledger.file))
    monkeypatch.delitem(sys.modules, "canvas_shop", raising=False)
    import canvas_shop

    canvas_shop.app.configure(file=fleet.folder / "umbel.toml")
    yield canvas_shop
    app: Umbel = canvas_shop.app
    app.close()
    del sys.modules["canvas_shop"]


@pytest.mark.slow
@pytest.mark.parametrize("fleet", PAIRS, indirect=True, ids="-".join)
def test_a_great_chord_calls_back_once_while_workers_are_killed(fleet: Cluster, shop: Any) -> None:
    workers = [fleet.worker(wait=False), fleet.worker(wait=False)]
    for worker in workers:
        worker.wait_ready()
    chance, over = random.Random(7), threading.Event()

    def kill() -> None:
        for _ in range(KILLS):
            if over.wait(chance.uniform(6, 10) if FULL else chance.uniform(0.5, 1.5)):
                return
            which = chance.randrange(2)
            workers[which].kill_all()
            workers[which] = fleet.worker(wait=False)

    killing = threading.Thread(target=kill)
    killing.start()
    try:
        sent = (group(shop.double.s(number) for number in range(MEMBERS)) | shop.total.s()).apply_async()
        value = sent.get(timeout=800 if FULL else 100)
    finally:
        over.set()
        killing.join()
    assert value == MEMBERS * (MEMBERS - 1)
    time.sleep(1)  # a second callback would come now
    bodies = fleet.ledger.lines("body")
    assert [line["value"] for line in bodies][:1] == [MEMBERS]
    # Its own process may be killed while it runs: then, and only then, it starts again.
    assert len(bodies) <= 1 + sum(not worker.running for worker in fleet.workers)


@pytest.mark.slow
@pytest.mark.parametrize("fleet", PAIRS, indirect=True, ids="-".join)
def test_canvases_of_all_kinds_on_processes(fleet: Cluster, shop: Any) -> None:
    fleet.worker()
    flaky, split, double, total = shop.flaky, shop.split, shop.double, shop.total
    deep: Any = double.s(1)
    for _ in range(3):
        deep = chord([deep, flaky.s(3), split.s(2)], total.s())
    several = [
        (deep, 32),
        (chain(double.s(1), group([double.s(), flaky.si(3)]), total.s(), double.s()), 20),
        (group([split.s(n) for n in range(3)]) | total.s(), 6),
        (chain(double.s(1), split.s()), 4),
    ]
    sent = [(canvas.apply_async(), value) for canvas, value in several]
    for handle, value in sent:
        assert handle.get(timeout=30) == value
    shop.start.delay(50).get(timeout=20)
    assert shop.app.result("from within").get(timeout=20) == 50 * 49
