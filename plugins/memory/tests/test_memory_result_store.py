"""The laws of the result store port and its abilities, in the official test double."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from umbel.errors import ResultStoreUnavailable
from umbel.model import Result
from umbel.ports.clock import VirtualClock
from umbel_memory.result_store import MemoryResultStore


def run(test: Callable[[MemoryResultStore, VirtualClock], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        clock = VirtualClock()
        store = MemoryResultStore(f"memory://{uuid.uuid4().hex}", clock=clock)
        try:
            async with asyncio.timeout(20):
                await test(store, clock)
        finally:
            await store.close()

    asyncio.run(main())


def result(task_id: str, state: str = "SUCCESS", document: bytes = b"{}", **fields: Any) -> Result:
    return Result(task_id=task_id, state=state, document=document, **fields)


def test_put_replaces_until_a_final_state_and_never_after() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        await store.put([result("a", "STARTED")])
        await store.put([result("a", "RETRY"), result("b", "CUSTOM")])
        assert (await store.get(["a", "b", "c"])) == {"a": result("a", "RETRY"), "b": result("b", "CUSTOM")}
        for final in ("SUCCESS", "FAILURE", "REVOKED"):
            await store.put([result(final, final, b"first")])
            await store.put([result(final, "STARTED"), result(final, "SUCCESS", b"second")])
            assert (await store.get([final]))[final] == result(final, final, b"first")

    run(test)


def test_entries_of_one_call_are_as_if_put_one_after_the_other() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        later = [result("a", "SUCCESS", b"2"), result("a", "STARTED")]
        await store.put([result("a", "STARTED"), result("a", "SUCCESS", b"1"), *later])
        await store.put([result("b", "STARTED"), result("b", "RETRY")])
        got = await store.get(["a", "b"])
        assert (got["a"].document, got["b"].state) == (b"1", "RETRY")

    run(test)


def test_records_expire_by_the_clock_and_a_replacement_has_its_own_time() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        await store.put([result("a", expires=10), result("b", "STARTED", expires=10), result("c")])
        await store.put([result("b", "RETRY", expires=100)])
        clock.advance(9.9)
        assert set(await store.get(["a", "b", "c"])) == {"a", "b", "c"}
        clock.advance(0.1)
        assert set(await store.get(["a", "b", "c"])) == {"b", "c"}
        await store.put([result("a", "STARTED")])
        assert (await store.get(["a"]))["a"].state == "STARTED"
        clock.advance(30 * 86_400)
        assert set(await store.get(["a", "b", "c"])) == {"a", "c"}

    run(test)


def test_wait_hears_of_final_records_only_before_and_after_the_call() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        await store.put([result("early")])
        assert await store.wait("early") == result("early")
        waiting = [asyncio.ensure_future(store.wait("late")) for _ in range(3)]
        await asyncio.sleep(0.01)
        await store.put([result("late", "STARTED")])
        await asyncio.sleep(0.01)
        assert not any(waiter.done() for waiter in waiting)
        waiting.pop().cancel()
        await store.put([result("late", "FAILURE")])
        assert await asyncio.gather(*waiting) == [result("late", "FAILURE")] * 2
        assert not store._memory.waiters
        assert not store._waiting

    run(test)


def test_wait_is_answered_across_loops_and_threads() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    waiting = threading.Barrier(2)
    got: list[Result] = []

    async def client() -> None:
        store = MemoryResultStore(url)
        answer = asyncio.ensure_future(store.wait("a"))
        await asyncio.sleep(0.01)
        waiting.wait(5)
        got.append(await answer)
        await store.close()

    async def worker() -> None:
        store = MemoryResultStore(url)
        await store.put([result("a")])
        await store.close()

    thread = threading.Thread(target=lambda: asyncio.run(client()), daemon=True)
    thread.start()
    waiting.wait(5)
    asyncio.run(worker())
    thread.join(5)
    assert got == [result("a")]


def test_forget_deletes() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        await store.put([result("a"), result("b")])
        await store.forget(["a", "unknown"])
        assert set(await store.get(["a", "b"])) == {"b"}
        await store.put([result("a", "STARTED")])
        assert (await store.get(["a"]))["a"].state == "STARTED"

    run(test)


def test_close_cancels_waits_keeps_records_and_ends_the_instance() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        await store.put([result("a")])
        waiting = asyncio.ensure_future(store.wait("b"))
        await asyncio.sleep(0.01)
        await store.close()
        await store.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(ResultStoreUnavailable, match="closed"):
            await store.get(["a"])
        assert set(await MemoryResultStore(store.url, clock=clock).get(["a"])) == {"a"}

    run(test)


def test_join_counts_each_member_once_and_fires_once() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        async def mark(*members: str, owner: str, size: int | None = None, value: bytes = b"1") -> tuple[Any, ...]:
            state = await store.join("j", dict.fromkeys(members, value), size=size, owner=owner, lease=30)
            return state.count, state.size, state.fires

        assert await mark("a", owner="w1") == (1, None, False)
        assert await mark("a", owner="w1", value=b"other") == (1, None, False)
        assert await mark("b", owner="w2", size=3) == (2, 3, False)
        assert await store.unfired() == []
        assert await mark("c", owner="w3") == (3, 3, True)
        assert await mark("c", owner="w4") == (3, 3, False)
        assert await mark("c", owner="w3") == (3, 3, True)
        assert await store.members("j") == {"a": b"1", "b": b"1", "c": b"1"}
        assert await store.fired("j", "w4") is False
        assert await store.fired("j", "w3") is True
        clock.advance(1000)
        assert await mark("c", owner="w3") == (3, 3, False)
        assert await store.unfired() == []
        assert (await store.members("unknown"), await store.fired("unknown", "w")) == ({}, False)

    run(test)


def test_the_right_to_fire_passes_on_when_its_lease_ends() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        assert (await store.join("j", {"a": b""}, size=1, owner="dies", lease=30)).fires
        clock.advance(29)
        assert not (await store.join("j", {}, size=None, owner="w2", lease=30)).fires
        assert await store.unfired() == []
        clock.advance(1)
        assert await store.unfired() == ["j"]
        assert (await store.join("j", {}, size=None, owner="w2", lease=30)).fires
        assert await store.unfired() == []
        assert await store.fired("j", "dies") is False
        assert await store.fired("j", "w2") is True

    run(test)


def test_only_one_of_many_racing_owners_fires() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        states = await asyncio.gather(
            *(store.join("j", {str(n): b""}, size=20, owner=f"w{n}", lease=30) for n in range(20)),
            *(store.join("j", {str(n): b""}, size=20, owner=f"again{n}", lease=30) for n in range(20)),
        )
        assert sum(state.fires for state in states) == 1

    run(test)


def test_a_join_is_forgotten_a_while_after_its_last_mark() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        await store.join("j", {"a": b""}, size=3, owner="w", lease=1, expires=10)
        clock.advance(9)
        await store.join("j", {"b": b""}, size=None, owner="w", lease=1)
        clock.advance(9)
        await store.join("j", {}, size=None, owner="w", lease=1)
        assert set(await store.members("j")) == {"a", "b"}
        clock.advance(1)
        assert await store.members("j") == {}

    run(test)


def test_unfired_is_limited() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        for n in range(5):
            await store.join(f"j{n}", {"a": b""}, size=1, owner="w", lease=1)
        clock.advance(2)
        assert len(await store.unfired(limit=3)) == 3
        assert len(await store.unfired()) == 5

    run(test)


def test_claims_are_exclusive_renewable_and_fenced() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        now = clock.time()
        first = await store.claim("n", "a", lease=10, value=b"v")
        assert (first.owner, first.until, first.value) == ("a", now + 10, b"v")
        assert await store.claim("n", "b", lease=10) == first
        clock.advance(5)
        renewed = await store.claim("n", "a", lease=10, value=b"v")
        assert (renewed.fence, renewed.until) == (first.fence, now + 15)
        assert await store.claim("n", "a", lease=10) == renewed, "a renewal without a value keeps it"
        assert (await store.claim("n", "a", lease=10, value=b"")).value == b""
        clock.advance(10)
        assert await store.claims() == []
        second = await store.claim("n", "b", lease=10)
        assert (second.owner, second.value) == ("b", b"")
        assert second.fence > first.fence
        assert await store.release("n", "a") is False
        assert await store.release("n", "b") is True
        assert await store.release("n", "b") is False
        third = await store.claim("n", "a", lease=10)
        assert third.fence > second.fence

    run(test)


def test_claims_are_listed_by_prefix_and_ended_ones_leave_no_trace() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        for n in range(300):
            await store.claim(f"short:{n}", "a", lease=1)
        await store.claim("long:1", "a", lease=100)
        assert len(await store.claims("short:")) == 300
        clock.advance(2)
        assert [lease.name for lease in await store.claims()] == ["long:1"]
        for _ in range(300):
            await store.claim("long:1", "a", lease=100)
        assert len(store._memory.claims._heap) < 100

    run(test)


def test_query_is_newest_first_by_state_in_pages() -> None:
    async def test(store: MemoryResultStore, clock: VirtualClock) -> None:
        for n in range(6):
            await store.put([result(str(n), "SUCCESS" if n % 2 else "FAILURE")])
        await store.put([result("x", "STARTED", expires=1), result("0")])
        assert [r.task_id for r in await store.query()] == ["x", "5", "4", "3", "2", "1", "0"]
        assert [r.task_id for r in await store.query(state="SUCCESS", limit=2, offset=1)] == ["3", "1"]
        clock.advance(1)
        assert await store.query(state="STARTED") == []

    run(test)
