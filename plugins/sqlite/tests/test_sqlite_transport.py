from __future__ import annotations

import asyncio
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from umbel.capabilities import UNLIMITED
from umbel.errors import BrokerUnavailable, PublishRefused
from umbel.model import Action, Delivery, Message, QueueSpec, Settlement, evolve
from umbel.ports.clock import VirtualClock
from umbel.ports.transport import Credit, QueueDepth
from umbel_sqlite import messages
from umbel_sqlite.transport import SqliteTransport

ACK, REQUEUE, DEAD = Action.ACK, Action.REQUEUE, Action.DEAD


def end(delivery: Delivery, action: Action = ACK, **how: Any) -> Settlement:
    return Settlement(delivery=delivery, action=action, **how)


def ids(deliveries: Any) -> list[str]:
    return [delivery.message.id for delivery in deliveries]


def test_construction_does_no_io(tmp_path: Path) -> None:
    SqliteTransport(f"sqlite:///{tmp_path}/none/q.sqlite3")
    assert list(tmp_path.iterdir()) == []


def test_capabilities() -> None:
    c = SqliteTransport("sqlite:///x.sqlite3").capabilities
    assert c.durable
    assert c.confirm
    assert c.renewable_lease
    assert c.delivery_count
    assert c.start_marks
    assert c.broadcast
    assert c.blocking_publish
    assert (c.max_delay, c.priority_levels, c.max_message_size) == (UNLIMITED, 10, 64 * 2**20)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"body": b"x"},
        {"body": bytes(range(256)) * 40_000},
        {"queue": ""},
        {"queue": "größe-큐-🐝"},
        {"headers": {"n": None, "f": 1.5, "i": 2**70, "l": [1, [True]], "d": {"b": "x", "d": {"k": 1}}, "é": "\ud800"}},
        {"headers": {"raw": b"\x00\xff", "deep": [{"b": b"1", "d": {"b": "not bytes"}}]}, "properties": {"p": b""}},
        {"headers": {"!": "!"}, "content_type": "application/x-python", "content_encoding": "binary", "priority": 9},
        {"properties": {"correlation_id": "c", "delivery_mode": 2}},
    ],
    ids=range(9),
)
def test_a_message_comes_back_as_it_was(transport: Any, take: Any, fields: dict[str, Any]) -> None:
    async def main() -> None:
        sent = Message(**{"queue": "q", **fields})
        async with transport() as t:
            await t.publish([sent], timeout=5)
            [peeked] = await t.peek(sent.queue)
            [delivery] = await take(t, sent.queue, 1)
            assert delivery.message == peeked == sent
            assert delivery.queue == sent.queue

    asyncio.run(main())


def test_a_message_outlives_its_sender(transport: Any, take: Any, message: Any) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.publish([message("1"), message("2")], timeout=5)
        async with transport() as t:
            assert ids(await take(t, "q", 2)) == ["1", "2"]

    asyncio.run(main())


def test_order_is_priority_then_age_over_all_queues(transport: Any, take: Any, message: Any) -> None:
    async def main() -> None:
        async with transport() as t:
            for id_, queue, priority in [("a", "x", 0), ("b", "y", 9), ("c", "x", 5), ("d", "y", 5), ("e", "z", 9)]:
                await t.publish([message(id_, queue, priority=priority)], timeout=5)
            assert ids(await take(t, ["x", "y", "x"], 4)) == ["b", "c", "d", "a"]
            assert ids(await take(t, ["z", "nowhere"], 1)) == ["e"]

    asyncio.run(main())


def test_credit_bounds_what_is_out_even_for_two_consumers(transport: Any, message: Any) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.publish([message(str(i)) for i in range(20)], timeout=5)
            credit, got, full = Credit(3), [], asyncio.Event()

            async def consume() -> None:
                async for batch in t.consume(["q"], credit=credit, lease=30):
                    assert credit.out <= 3
                    got.extend(batch)
                    await asyncio.sleep(0)
                    await t.settle([end(d) for d in batch])
                    credit.give(len(batch))
                    if len(got) == 20:
                        full.set()

            consumers = [asyncio.create_task(consume()) for _ in range(2)]
            await full.wait()
            for task in consumers:
                task.cancel()
            await asyncio.gather(*consumers, return_exceptions=True)
            assert sorted(ids(got), key=int) == [str(i) for i in range(20)]
            assert credit.out == 0

    asyncio.run(main())


def test_a_lease_that_ends_hands_the_message_out_again_with_its_count_raised(
    transport: Any, take: Any, message: Any
) -> None:
    async def main() -> None:
        clock = VirtualClock()
        async with transport(clock) as t:
            await t.publish([message()], timeout=5)
            [first] = await take(t, "q", 1, lease=10)
            assert (first.count, first.leased_until) == (1, clock.time() + 10)
            clock.advance(9.9)
            assert (await t.depth(["q"]))["q"] == QueueDepth(leased=1)
            clock.advance(0.2)
            assert (await t.depth(["q"]))["q"].ready == 1
            [second] = await take(t, "q", 1, lease=10)
            assert second.count == 2
            assert await t.renew([first, second], lease=10) == [False, True]
            for action in Action:
                assert await t.settle([end(first, action)]) == [False]
            assert await t.settle([end(second), end(second)]) == [True, False]
            assert await t.settle([end(second)]) == [False]
            assert (await t.depth(["q"]))["q"] == QueueDepth()

    asyncio.run(main())


def test_a_lapsed_delivery_can_be_settled_as_long_as_nobody_else_has_it(
    transport: Any, take: Any, message: Any
) -> None:
    async def main() -> None:
        clock = VirtualClock()
        async with transport(clock) as t:
            await t.publish([message("1"), message("2")], timeout=5)
            one, two = await take(t, "q", 2, lease=1)
            clock.advance(2)
            assert len(await t.peek("q")) == 2
            assert await t.renew([two], lease=10) == [True]
            assert ids(await take(t, "q", 1)) == ["1"]
            assert await t.settle([end(one), end(two)]) == [False, True]

    asyncio.run(main())


def test_a_row_number_used_again_does_not_match_an_old_delivery(transport: Any, take: Any, message: Any) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.publish([message("old")], timeout=5)
            [old] = await take(t, "q", 1)
            await t.settle([end(old)])
            await t.publish([message("new")], timeout=5)
            [new] = await take(t, "q", 1)
            assert new.token.id == old.token.id
            assert await t.settle([end(old), end(new)]) == [False, True]

    asyncio.run(main())


def test_renewal_extends_the_lease_and_start_marks_are_kept(transport: Any, take: Any, message: Any) -> None:
    async def main() -> None:
        clock = VirtualClock()
        async with transport(clock) as t:
            await t.publish([message("1"), message("2")], timeout=5)
            one, two = await take(t, "q", 2, lease=10)
            assert await t.renew([one], lease=100, starting=True) == [True]
            clock.advance(11)
            [again] = await take(t, "q", 1, lease=10)
            assert (again.message.id, again.starts, again.count) == ("2", 0, 2)
            clock.advance(100)
            assert {d.message.id: d.starts for d in await take(t, "q", 2)} == {"1": 1, "2": 0}
            assert await t.renew([one, two], lease=1) == [False, False]
            assert await t.renew([], lease=1) == await t.settle([]) == []

    asyncio.run(main())


def test_requeue_goes_to_the_front_and_counts_as_told(transport: Any, take: Any, message: Any) -> None:
    async def main() -> None:
        clock = VirtualClock()
        async with transport(clock) as t:
            await t.publish([message(str(i)) for i in range(4)], timeout=5)
            a, b, c = await take(t, "q", 3)
            settled = [end(a, REQUEUE), end(b, REQUEUE, counted=False), end(c, REQUEUE, delay=5)]
            assert await t.settle(settled) == [True] * 3
            assert await t.settle(settled) == [False] * 3
            assert await t.depth(["q"]) == {"q": QueueDepth(ready=3, delayed=1, oldest=clock.time())}
            assert [(d.message.id, d.count) for d in await take(t, "q", 3)] == [("0", 2), ("1", 1), ("3", 1)]
            clock.advance(5)
            assert [(d.message.id, d.count) for d in await take(t, "q", 1)] == [("2", 2)]

    asyncio.run(main())


def test_dead_letters_carry_their_cause_and_are_ordinary_messages(transport: Any, take: Any, message: Any) -> None:
    async def main() -> None:
        clock = VirtualClock()
        async with transport(clock) as t:
            await t.publish([message("1", headers={"raw": b"\xff"}, due=clock.time() - 1)], timeout=5)
            [delivery] = await take(t, "q", 1)
            await t.renew([delivery], lease=30, starting=True)
            assert await t.settle([end(delivery, DEAD, cause="no such task"), end(delivery)]) == [True, False]
            assert await t.depth() == {"q.dead": QueueDepth(ready=1, oldest=clock.time())}
            [peeked] = await t.peek("q.dead")
            [dead] = await take(t, "q.dead", 1)
            assert dead.message == peeked
            assert (dead.count, dead.starts, dead.message.queue) == (1, 0, "q.dead")
            assert dead.message.headers == {
                **delivery.message.headers,
                "umbel-dead-cause": "no such task",
                "umbel-dead-queue": "q",
                "umbel-dead-at": clock.time(),
                "umbel-dead-count": 1,
            }

    asyncio.run(main())


def test_delayed_messages_wait_for_their_time(transport: Any, take: Any, message: Any) -> None:
    async def main() -> None:
        clock = VirtualClock()
        now = clock.time()
        async with transport(clock) as t:
            dues = {"late": now + 60, "soon": now + 5, "past": now - 5, "now": None}
            await t.publish([message(id_, due=due) for id_, due in dues.items()], timeout=5)
            assert await t.depth(["q"]) == {"q": QueueDepth(ready=2, delayed=2, oldest=now)}
            assert [m.id for m in await t.peek("q")] == ["past", "now", "soon", "late"]
            assert [m.id for m in await t.peek("q", limit=2, offset=1)] == ["now", "soon"]
            assert [m.id for m in await t.peek("q", offset=3)] == ["late"]
            assert ids(await take(t, "q", 2, lease=600)) == ["past", "now"]
            clock.advance(5)
            assert (await t.depth(["q"]))["q"] == QueueDepth(ready=1, delayed=1, leased=2, oldest=now + 5)
            await t.publish([message("after")], timeout=5)
            [soon, after] = await take(t, "q", 2, lease=600)
            assert (soon.message.due, after.message.id) == (now + 5, "after")
            clock.advance(1)
            await t.publish([message("older")], timeout=5)
            clock.advance(60)
            assert ids(await take(t, "q", 2)) == ["older", "late"]

    asyncio.run(main())


def test_a_consumer_wakes_at_the_due_time_and_not_before(transport: Any, message: Any) -> None:
    async def main() -> None:
        async with transport(poll_interval=60) as t:
            stream = t.consume(["q"], credit=Credit(9), lease=30)
            waiting = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.05)
            due = time.time() + 0.2
            await t.publish([message("1", due=due)], timeout=5)
            [delivery] = await asyncio.wait_for(waiting, 3)
            assert due <= time.time() < due + 1  # the poll would take a minute
            requeued = await t.settle([end(delivery, REQUEUE, delay=0.1)])
            assert requeued == [True]
            assert len(await asyncio.wait_for(anext(stream), 3)) == 1

    asyncio.run(main())


def test_a_consumer_wakes_when_a_lease_ends_or_a_message_is_given_back(transport: Any, take: Any, message: Any) -> None:
    async def main() -> None:
        async with transport(poll_interval=60) as t, transport(poll_interval=60) as other:
            await t.publish([message("1")], timeout=5)
            await take(other, "q", 1, lease=0.15)
            stream = t.consume(["q"], credit=Credit(9), lease=30)
            [delivery] = await asyncio.wait_for(anext(stream), 3)
            assert delivery.count == 2
            waiting = asyncio.create_task(anext(other.consume(["q"], credit=Credit(1), lease=30)))
            await asyncio.sleep(0.05)
            await t.settle([end(delivery, REQUEUE)])
            assert ids(await asyncio.wait_for(waiting, 3)) == ["1"]

    asyncio.run(main())


def test_an_idle_consumer_and_one_without_credit_report_within_five_seconds(
    transport: Any, message: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbel_sqlite.transport._LONGEST_SILENCE", 0.1)

    async def main() -> None:
        async with transport(poll_interval=60) as t:
            idle = t.consume(["q"], credit=Credit(1), lease=30)
            assert await asyncio.wait_for(anext(idle), 3) == []
            await t.publish([message()], timeout=5)
            broke = t.consume(["q"], credit=Credit(0), lease=30)
            assert await asyncio.wait_for(anext(broke), 3) == []

    asyncio.run(main())


def test_a_cancelled_claim_is_given_back_uncounted(transport: Any, take: Any, message: Any) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.publish([message(str(i)) for i in range(5)], timeout=5)
            credit = Credit(5)
            for _ in range(50):
                waiting = asyncio.create_task(anext(t.consume(["q"], credit=credit, lease=30)))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                assert credit.out == 0
                assert (await t.depth(["q"]))["q"].leased == 0
            assert {d.count for d in await take(t, "q", 5)} == {1}

    asyncio.run(main())


def test_close_gives_back_what_was_not_yielded_and_ends_consumers(
    transport: Any, take: Any, message: Any, file: Path
) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.publish([message("1"), message("2"), message("3")], timeout=5)
            [kept] = await take(t, "q", 1)
            waiting = asyncio.create_task(anext(t.consume(["q"], credit=Credit(1), lease=30)))
            idle = asyncio.create_task(anext(t.consume(["other"], credit=Credit(1), lease=30)))
            broke = asyncio.create_task(anext(t.consume(["q"], credit=Credit(0), lease=30)))
            hearing = asyncio.create_task(anext(t.subscribe("topic")))
            await asyncio.sleep(0)
            await t.close()
            await t.close()
            ended = await asyncio.wait_for(asyncio.gather(waiting, idle, broke, hearing, return_exceptions=True), 3)
            assert [type(error) for error in ended] == [BrokerUnavailable] * 4
            with pytest.raises(BrokerUnavailable, match="closed"):
                await t.publish([message("4")], timeout=5)
            with pytest.raises(BrokerUnavailable, match="closed"):
                t.publish_blocking([message("4")], timeout=5)
            with pytest.raises(BrokerUnavailable, match="closed"):
                await t.settle([end(kept)])
            with pytest.raises(BrokerUnavailable, match="closed"):
                await anext(t.consume(["q"], credit=Credit(1), lease=30))
        async with transport() as t:
            assert [(d.message.id, d.count) for d in await take(t, "q", 2)] == [("2", 1), ("3", 1)]
            assert await t.renew([kept], lease=30) == [True]
            assert await t.settle([end(kept)]) == [True]

    asyncio.run(main())
    assert not list((file.parent / (file.name + "-listeners")).iterdir())


def test_purge_spares_what_is_handed_out(
    transport: Any, take: Any, message: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "_PURGED_AT_ONCE", 3)

    async def main() -> None:
        async with transport() as t:
            await t.publish([message("leased")], timeout=5)
            [leased] = await take(t, "q", 1)
            await t.publish([message(str(i)) for i in range(7)], timeout=5)
            await t.publish([message("later", due=time.time() + 60), message("else", "other")], timeout=5)
            assert await t.purge("q") == 8
            assert await t.purge("q") == 0
            depths = await t.depth()
            assert depths["q"] == QueueDepth(leased=1)
            assert depths["other"].ready == 1
            assert await t.settle([end(leased)]) == [True]

    asyncio.run(main())


def test_depth_lists_declared_and_asked_for_queues(transport: Any, message: Any) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.declare([QueueSpec(name="empty"), QueueSpec(name="prio", max_priority=5)])
            await t.declare([QueueSpec(name="empty")])
            await t.publish([message()], timeout=5)
            assert set(await t.depth()) == {"empty", "prio", "q"}
            assert set(await t.depth(["q", "nowhere"])) == {"q", "nowhere"}
            for spec in (QueueSpec(name="x", type="quorum"), QueueSpec(name="x", arguments={"x-max-length": 1})):
                with pytest.raises(PublishRefused, match=r"type|x-max-length"):
                    await t.declare([spec])

    asyncio.run(main())


def test_broadcast_reaches_who_listens_now_in_order(
    transport: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "_BROADCASTS_AT_ONCE", 3)

    async def main() -> None:
        clock = VirtualClock()
        async with transport(clock, poll_interval=60) as t, transport(clock, poll_interval=60) as other:
            await t.broadcast("events", b"before anybody listens")
            hearers = [t.subscribe("events"), other.subscribe("events")]
            heard = [asyncio.create_task(anext(h)) for h in hearers]
            await asyncio.sleep(0.05)
            await t.broadcast("else", b"")
            for i in range(8):
                await t.broadcast("events", bytes([i]) * 1000, key=f"k.{i}")
            for hearer, first in zip(hearers, heard, strict=True):
                got = [await asyncio.wait_for(first, 3)] + [await asyncio.wait_for(anext(hearer), 3) for _ in range(7)]
                assert got == [(f"k.{i}", bytes([i]) * 1000) for i in range(8)]
            clock.advance(61)
            await t.broadcast("events", b"last")
            with closing(sqlite3.connect(file)) as connection:
                kept = connection.execute("SELECT payload FROM umbel_broadcasts").fetchall()
            assert kept == [(b"last",)]

    asyncio.run(main())


def test_sizes_are_bounded(transport: Any, message: Any) -> None:
    async def main() -> None:
        async with transport(max_message_size=10) as t:
            await t.publish([message(body=b"x" * 10)], timeout=5)
            with pytest.raises(PublishRefused, match="max_message_size"):
                await t.publish([message("2"), message("3", body=b"x" * 11)], timeout=5)
            with pytest.raises(PublishRefused, match="max_message_size"):
                await t.broadcast("t", b"x" * 11)
            assert (await t.depth(["q"]))["q"].ready == 1

    asyncio.run(main())


def test_publishes_that_wait_together_share_a_transaction_but_not_a_fault(transport: Any, message: Any) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.publish([], timeout=5)
            await t.publish([message("first")], timeout=5)
            begun: list[str] = []
            t._db._connection.sqlite.set_trace_callback(begun.append)
            await asyncio.gather(*(t.publish([message(str(i))], timeout=5) for i in range(500)))
            assert begun.count("COMMIT") < 10
            bad = message("bad", headers={"x": object()})
            outcomes = await asyncio.gather(
                *(t.publish([m], timeout=5) for m in [message("a"), bad, message("b")]), return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [type(None), PublishRefused, type(None)]
            assert "plain data" in str(outcomes[1])
            assert (await t.depth(["q"]))["q"].ready == 503

    asyncio.run(main())


def test_publishing_from_threads_needs_no_event_loop(file: Path, transport: Any, message: Any) -> None:
    alone = SqliteTransport(f"sqlite:///{file}")
    alone.publish_blocking([], timeout=5)
    with ThreadPoolExecutor(8) as threads:
        for done in [
            threads.submit(alone.publish_blocking, [message(f"{n}-{i}") for i in range(3)], timeout=20)
            for n in range(50)
        ]:
            done.result()
    with pytest.raises(PublishRefused, match="plain data"):
        alone.publish_blocking([message(headers={"x": object()})], timeout=5)
    asyncio.run(alone.close())

    async def main() -> None:
        async with transport(poll_interval=60) as t:
            assert len(await t.peek("q", limit=1000)) == 150
            waiting = asyncio.create_task(anext(t.consume(["woken"], credit=Credit(1), lease=30)))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(t.publish_blocking, [message(queue="woken")], timeout=5)
            assert len(await asyncio.wait_for(waiting, 3)) == 1

    asyncio.run(main())


def test_a_claim_reads_no_more_than_it_claims(transport: Any, message: Any) -> None:
    """Neither the backlog nor what is delayed is scanned, whatever the statistics say."""

    async def main() -> list[str]:
        async with transport() as t:
            await t.publish([message(str(i)) for i in range(300)], timeout=5)
            connection = t._db._connection.sqlite
            plans = [
                connection.execute("EXPLAIN QUERY PLAN " + sql, parameters).fetchall()
                for sql, parameters in [
                    (messages.CLAIMABLE, {"queues": '["a", "b"]', "limit": 5}),
                    (messages.PROMOTE, (0.0, 10)),
                    (messages.NEXT_DUE, ()),
                    (messages.HELD, ("[[1, 2]]",)),
                ]
            ]
            return [row[3] for plan in plans for row in plan]

    steps = asyncio.run(main())
    assert any("umbel_messages_ready (queue=?)" in step for step in steps)
    scans = [step for step in steps if step.startswith("SCAN")]
    assert [step for step in scans if "VIRTUAL TABLE" not in step] == []


def test_headers_that_another_process_wrote_with_bytes_are_told_apart_from_json() -> None:
    plain = Message(queue="q", headers={"b": "eA=="})
    raw = evolve(plain, headers={"b": b"x"})
    heads = [messages.encode_head(m) for m in (plain, raw)]
    assert heads[0].startswith("[")
    assert heads[1].startswith("!")
    for head, sent in zip(heads, (plain, raw), strict=True):
        assert messages.decode_message("q", 0, None, head, b"") == sent
