"""Brokers that die, come back, are not there, or turn callers away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from brokers import Broker
from cluster import until
from fleet import Fleet, Sender
from servers.proxy import Proxy
from servers.redis import RedisServer

from umbel.errors import BrokerUnavailable, PublishRefused

DEADLINE = 1.0
MARGIN = 3.0
"""Seconds beyond the deadline in which a call must have ended, on a machine that does other things too."""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_a_broker_accepts_is_done_though_it_is_killed_and_stopped_meanwhile(fleet: Fleet) -> None:
    """A client goes on sending: its calls end in time, and whatever they were told is true."""
    fleet.configure(broker__publish_timeout=DEADLINE, worker__max_deliveries=20, **fleet.broker.patient)
    for _ in range(2):
        fleet.worker()
    server = fleet.broker.server
    resumed = []
    with Sender(fleet.app) as sender:
        for end in (fleet.broker.kill, server.stop):
            before = len(sender.accepted) + 100
            until(lambda before=before: len(sender.accepted) >= before, "a hundred tasks are accepted", timeout=60)  # type: ignore[misc]  # mypy cannot infer lambdas with defaults
            refused = len(sender.refused)
            end()
            until(lambda refused=refused: len(sender.refused) > refused, "a call raises", timeout=DEADLINE + 30)  # type: ignore[misc]  # as above
            server.start()
            began, accepted = time.monotonic(), len(sender.accepted)
            until(
                lambda accepted=accepted: len(sender.accepted) > accepted,  # type: ignore[misc]  # as above
                "a task is accepted again",
                timeout=fleet.broker.resumes,
            )
            fleet.cluster.ledger.wait_start(sender.accepted[accepted], timeout=fleet.broker.resumes)
            resumed.append(time.monotonic() - began)
    assert sender.wrong == []
    assert sender.longest < DEADLINE + MARGIN
    fleet.wait_done(timeout=120)
    again = fleet.check_ledger(sender.accepted, perhaps=sender.refused)
    print(
        f"{fleet.broker.name}: {len(sender.accepted)} accepted, {len(sender.refused)} raised, {again} started again,"
        f" longest call {sender.longest:.2f} s, resumed after {', '.join(f'{one:.1f} s' for one in resumed)}"
    )


@pytest.mark.parametrize("silent", [False, True], ids=["nobody there", "a black hole"])
def test_a_call_ends_within_its_deadline_though_the_broker_does_not_answer(
    fleet: Fleet, make_proxy: Callable[[int], Proxy], silent: bool
) -> None:
    proxy = make_proxy(fleet.broker.server.port)
    proxy.stall() if silent else proxy.refuse()
    fleet.configure(broker__url=proxy.through(fleet.broker.url), broker__publish_timeout=DEADLINE)
    note = fleet.app.tasks["shop.note"]
    for call in (note.delay, lambda value: asyncio.run(_sent(note, value))):
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1"):
            call(1)
        assert time.monotonic() - began < DEADLINE + MARGIN
    proxy.heal()
    assert note.apply_async((2,), timeout=30).id
    assert fleet.broker.left() >= 1


async def _sent(note: object, value: int) -> None:
    await note.adelay(value)  # type: ignore[attr-defined]  # any task


def test_a_wrong_password_is_told_at_once(fleet: Fleet, broker: Broker, make_redis: Callable[..., RedisServer]) -> None:
    """Long before the deadline, by name, and without the password."""
    server = make_redis(password="right") if broker.name == "redis" else broker.server
    path = urlsplit(broker.url).path
    scheme = urlsplit(broker.url).scheme
    fleet.configure(broker__url=f"{scheme}://guest:wr0ng@127.0.0.1:{server.port}{path}", broker__publish_timeout=30.0)
    note = fleet.app.tasks["shop.note"]
    for call in (note.delay, lambda value: asyncio.run(_sent(note, value))):
        began = time.monotonic()
        with pytest.raises(PublishRefused, match=r"(?i)password|credentials|ACCESS_REFUSED") as refused:
            call(1)
        assert time.monotonic() - began < 5
        assert "wr0ng" not in str(refused.value)
