"""Messages that wait long, and tasks that run long."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta

import amqp
import kombu
import pytest
from brokers import RabbitBroker
from cluster import until
from fleet import FULL, Fleet, rss

DELAYED = 100_000 if FULL else 5_000
GROWTH = 16.0
"""MiB by which a worker may be larger for all that waits: a message of its own has some hundred bytes."""
LATE = 600.0 if FULL else 240.0
"""Seconds in which all are done after they were due."""


@pytest.mark.slow
@pytest.mark.timeout(1800 if FULL else 480)
def test_delayed_tasks_wait_in_the_broker_and_outlive_it_and_the_worker(fleet: Fleet) -> None:
    fleet.configure(worker__max_deliveries=20, **fleet.broker.patient)
    began = time.monotonic()
    worker = fleet.worker()
    starting = time.monotonic() - began
    warm = fleet.send_many("note", [(n,) for n in range(500)])
    assert [one.get(timeout=30) for one in warm] == list(range(500))
    before = rss(worker)
    began = time.monotonic()
    warm += fleet.send_many("note", [(n,) for n in range(500, 1500)], countdown=0.5)
    sending = (time.monotonic() - began) * DELAYED / 1000
    due = datetime.now(UTC) + timedelta(seconds=2 * sending + 5 * starting + fleet.broker.restarts)
    sent = [task.id for task in fleet.send_many("note", [(n,) for n in range(DELAYED)], eta=due)]
    time.sleep(1)
    assert fleet.cluster.ledger.starts(sent[0]) == []
    assert fleet.broker.left() >= DELAYED  # RabbitMQ counts twice what passes from one queue to another
    grown = [rss(worker) - before]

    worker.kill_all()
    fleet.broker.kill()
    fleet.broker.server.start()
    worker = fleet.worker()
    before = rss(worker)
    until(lambda: fleet.broker.subscribers() == 1, "the worker has come to the broker")
    assert fleet.broker.left() >= DELAYED
    assert datetime.now(UTC) < due, "the machine is too slow for the test: nothing is delayed any more"
    grown.append(rss(worker) - before)
    assert max(grown) < GROWTH

    time.sleep(max(0.0, (due - datetime.now(UTC)).total_seconds()))
    fleet.wait_done(timeout=LATE)
    delay = (datetime.now(UTC) - due).total_seconds()
    fleet.check_ledger([*sent, *(one.id for one in warm)])
    ours = set(sent)
    delayed = [line for line in fleet.cluster.ledger.starts() if line["id"] in ours]
    assert Counter(line["id"] for line in delayed) == dict.fromkeys(sent, 1)
    assert min(line["at"] for line in delayed) >= due.timestamp() - 0.05
    print(
        f"{fleet.broker.name}: {DELAYED} delayed, worker {before:.0f} MiB and grown by at most {max(grown):.1f} MiB, done"
        f" {delay:.1f} s after they were due, worker then {rss(worker):.0f} MiB"
    )


LEASE = 3.0
CONSUMER_TIMEOUT = 60 if FULL else 3
LONG = 180.0 if FULL else 9.0


@pytest.mark.slow
@pytest.mark.timeout(600 if FULL else 300)
def test_f02_a_task_that_runs_for_three_times_its_lease_runs_once(fleet: Fleet) -> None:
    """Beside an idle worker that would take it; on RabbitMQ the limit is the consumer timeout, which is really enforced."""
    enforced = None
    if isinstance(fleet.broker, RabbitBroker):
        fleet.configure(broker__options__consumer_timeout=CONSUMER_TIMEOUT)
        enforced = EnforcedTimeout(fleet.broker)
    else:
        fleet.configure(broker__lease=LEASE)
    with enforced or nullcontext():
        for name in ("one", "two"):
            fleet.worker("--name", name)
        tasks = fleet.send_many("note", [(n, LONG) for n in range(2)])
        assert [task.get(timeout=LONG + 60) for task in tasks] == [0, 1]
        fleet.wait_done(timeout=60)
    starts = Counter(line["id"] for line in fleet.cluster.ledger.starts())
    assert starts == {task.id: 1 for task in tasks}
    assert fleet.cluster.dead() == []


class EnforcedTimeout:
    """A RabbitMQ that closes the channels of who keeps a message for too long, which is shown by one who does."""

    def __init__(self, broker: RabbitBroker) -> None:
        self._server = broker.server
        self._connection = kombu.Connection(broker.server.vhost(), heartbeat=0)
        self._said = len(broker.server.log.read_text(errors="replace"))

    def __enter__(self) -> None:
        # Both are read when a channel is made; RabbitMQ looks for the late once a minute.
        self._set("consumer_timeout", CONSUMER_TIMEOUT * 1000)
        self._set("channel_tick_interval", 1000)
        self._channel = self._connection.channel()
        queue = kombu.Queue("kept", channel=self._channel)
        queue.declare()
        self._channel.basic_publish(amqp.Message("kept"), routing_key="kept")
        queue.consume(no_ack=False, callback=lambda message: None)
        self._connection.drain_events(timeout=10)

    def __exit__(self, *exc: object) -> None:
        self._set("consumer_timeout", 1_800_000)
        self._set("channel_tick_interval", 60_000)
        self._connection.release()
        if exc == (None, None, None):
            assert "delivery acknowledgement" in self._server.log.read_text(errors="replace")[self._said :]

    def _set(self, name: str, milliseconds: int) -> None:
        self._server.eval(f"application:set_env(rabbit, {name}, {milliseconds})")
