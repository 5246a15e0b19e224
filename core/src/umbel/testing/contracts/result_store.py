"""The laws of the result store port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest

from umbel.capabilities import ResultStoreCapabilities
from umbel.errors import ResultStoreUnavailable
from umbel.model import FINAL_STATES
from umbel.ports.clock import Clock
from umbel.ports.result_store import ClaimStore, JoinStore, QueryableStore, ResultStore
from umbel.testing.contracts.bench import TURNS, Belongings, interrupt, law
from umbel.testing.contracts.result_store_abilities import AbilityLaws
from umbel.testing.contracts.result_store_bench import StoreBench


class ResultStoreContract(AbilityLaws):
    """Subclass it and give the fixture ``make_store``: a callable that makes an instance on one and the same backend.

    Where results are sent to who asked (``reply_to``), the instance that a law made last is who asked.
    Laws use task ids, keys and states of their own, so one backend may serve all tests. Give the fixtures ``clock``,
    ``sever`` and ``restart`` where the driver allows.
    """

    lease: float = 0.5
    """Seconds, in the drivers' time: the leases and expiries that laws let end. The shortest that the store keeps."""
    patience: float = 10.0
    """Seconds within which what must happen does happen."""
    quiet: float = 0.15
    """Seconds for which laws watch that nothing happens: longer than the way to the store and back."""
    time_limit: float = 60.0
    """Seconds that one law may take."""

    many: int = 3000
    """Records in the law about thousands."""

    @pytest.fixture
    def clock(self) -> Clock | None:
        """The clock that the factory gives to the drivers, if it does; a ``VirtualClock`` makes the laws wait in no time."""
        return None

    @pytest.fixture
    def sever(self) -> Callable[[ResultStore], Awaitable[None]] | None:
        """Cuts the connection of a store as a failing network would. None: it has none that could be cut."""
        return None

    @pytest.fixture
    def restart(self) -> Callable[[], Awaitable[None]] | None:
        """Kills the backend and starts it again with what it has kept. None: no way to, or it is declared not durable."""
        return None

    @pytest.fixture
    def bench(self, make_store: Callable[[], ResultStore], clock: Clock | None) -> StoreBench:
        return StoreBench(
            make_store,
            clock=clock,
            time_limit=self.time_limit,
            patience=self.patience,
            quiet=self.quiet,
            lease=self.lease,
        )

    @law
    async def test_a_driver_says_what_it_is(self, bench: StoreBench) -> None:
        store = bench.store()
        assert isinstance(store, ResultStore)
        assert isinstance(store.capabilities, ResultStoreCapabilities)
        assert attrs.has(type(store).Options)
        assert isinstance(store.options, type(store).Options)
        assert type(store).api_version[0] == ResultStore.api_version[0]
        declared = store.capabilities
        abilities = [isinstance(store, port) for port in (JoinStore, ClaimStore, QueryableStore)]
        assert abilities == [declared.join, declared.claim, declared.query], (
            "an ability is declared, or it is not there"
        )

    # --- records --------------------------------------------------------------------------------

    @pytest.mark.parametrize("document", [b"", b"{}", b"\x00\xff" * 50, b"x" * 1_000_000], ids=len)
    @law
    async def test_a_record_comes_back_whole(self, bench: StoreBench, document: bytes) -> None:
        store, other = bench.store(), bench.store()
        put = bench.result("ü名🌸 1", "SUCCESS", document, content_type="application/x-kit", content_encoding="binary")
        await store.put([put])
        assert await other.get([put.task_id]) == {put.task_id: put}

    @law
    async def test_get_gives_those_there_are(self, bench: StoreBench) -> None:
        store, (one, two) = bench.store(), bench.results("1", "2")
        await store.put([one, two])
        assert await store.get([one.task_id, bench.id("none"), two.task_id]) == {one.task_id: one, two.task_id: two}
        assert await store.get([bench.id("none")]) == {}

    @law
    async def test_nothing_asked_is_nothing_done(self, bench: StoreBench) -> None:
        store = bench.store()
        await store.put([])
        await store.forget([])
        assert await store.get([]) == {}

    @law
    async def test_a_later_state_replaces_an_earlier_one(self, bench: StoreBench) -> None:
        store, other = bench.store(), bench.store()
        for state in ("RECEIVED", "STARTED", "RETRY", "HALF WAY", "STARTED", "SUCCESS"):
            await store.put([bench.result("1", state, state.encode())])
            assert (await other.get([bench.id("1")]))[bench.id("1")].document == state.encode()

    @law
    async def test_a_final_state_never_changes(self, bench: StoreBench) -> None:
        store, other = bench.store(), bench.store()
        finals = [bench.result(state, state, b"first") for state in sorted(FINAL_STATES)]
        await store.put(finals)
        for late in ("STARTED", "RETRY", *sorted(FINAL_STATES)):
            await other.put([attrs.evolve(final, state=late, document=b"late") for final in finals])
        assert await other.get([final.task_id for final in finals]) == {final.task_id: final for final in finals}

    @law
    async def test_a_passing_state_that_comes_late_changes_nothing(self, bench: StoreBench) -> None:
        other, store, name = bench.store(), bench.store(), bench.id("1")  # who asked is made last

        async def after(state: str, order: int, document: bytes, **fields: Any) -> tuple[str, bytes]:
            await other.put([bench.result("1", state, document, order=order, **fields)])
            found = (await store.get([name]))[name]
            return found.state, found.document

        assert await after("STARTED", 3, b'{"status": "STARTED", "n": 1}') == (
            "STARTED",
            b'{"status": "STARTED", "n": 1}',
        )
        for state, order in (("PENDING", 0), ("RECEIVED", 2)):
            assert (await after(state, order, b"{}"))[0] == "STARTED"
        assert await after("STARTED", 3, b"again", content_type="application/x-kit") == ("STARTED", b"again")
        assert (await after("RECEIVED", 2, b"{}"))[0] == "STARTED"
        assert (await after("STARTED", 2**40 + 3, b"{}"))[0] == "STARTED"
        assert (await after("HALF WAY", 2**40 + 4, b"{}"))[0] == "HALF WAY"
        assert (await after("STARTED", 2**40 + 3, b"{}"))[0] == "HALF WAY"
        assert (await after("SUCCESS", 0, b"end"))[0] == "SUCCESS"
        assert await after("RETRY", 2**50, b"{}") == ("SUCCESS", b"end")
        both = [bench.result("2", "RETRY", b"late", order=9), bench.result("2", "STARTED", b"early", order=4)]
        await other.put(both)
        assert (await store.get([both[0].task_id]))[both[0].task_id].document == b"late"

    @law
    async def test_the_later_of_one_call_wins(self, bench: StoreBench) -> None:
        store = bench.store()
        await store.put([bench.result("1", "RECEIVED", b"1"), bench.result("1", "STARTED", b"2")])
        assert (await store.get([bench.id("1")]))[bench.id("1")].document == b"2"
        await store.put([bench.result("1", "RETRY", b"3"), bench.result("1", "SUCCESS", b"4")])
        assert (await store.get([bench.id("1")]))[bench.id("1")].document == b"4"

    @law
    async def test_the_first_final_state_of_one_call_stays(self, bench: StoreBench) -> None:
        store, other, states = bench.store(), bench.store(), ("STARTED", "SUCCESS", "RETRY", "FAILURE")
        await store.put([bench.result("1", state, state.encode()) for state in states])
        found = await other.get([bench.id("1")])
        assert found == {bench.id("1"): bench.result("1", "SUCCESS", b"SUCCESS")}

    @law
    async def test_forgotten_is_gone(self, bench: StoreBench) -> None:
        store, other, (one, two) = bench.store(), bench.store(), bench.results("1", "2")
        await store.put([one, two])
        await other.forget([one.task_id, bench.id("none")])
        assert await other.get([one.task_id, two.task_id]) == {two.task_id: two}
        if other.reply_to is None:  # else nobody else had them
            assert await store.get([one.task_id, two.task_id]) == {two.task_id: two}
        again = attrs.evolve(one, document=b"again")
        await store.put([again])
        assert await other.get([one.task_id]) == {one.task_id: again}

    @law
    async def test_records_expire(self, bench: StoreBench) -> None:
        store = bench.store()
        await store.put([bench.result("short", expires=bench.lease), bench.result("long", expires=3600)])
        await store.put([bench.result("ever"), bench.result("replaced", "STARTED", expires=bench.lease)])
        await store.put([bench.result("replaced", "RETRY", expires=3600)])
        names = {name: bench.id(name) for name in ("short", "long", "ever", "replaced")}
        assert set(await store.get(list(names.values()))) == set(names.values())
        await bench.lease_ends()
        left = set(await store.get(list(names.values())))
        if bench.capabilities.expires:
            assert left == {names["long"], names["ever"], names["replaced"]}
        else:
            assert left == set(names.values())

    @law
    async def test_thousands_of_records_are_kept(self, bench: StoreBench) -> None:
        store, other, size = bench.store(), bench.store(), self.many // 12
        results = bench.results(*(str(n) for n in range(self.many)))
        await asyncio.gather(*(store.put(results[at : at + size]) for at in range(0, self.many, size)))
        found = await other.get([result.task_id for result in results])
        assert found == {result.task_id: result for result in results}

    @law
    async def test_what_was_stored_outlives_its_connection(self, bench: StoreBench) -> None:
        store, other, (one,) = bench.store(), bench.store(), bench.results("1")
        await store.put([one])
        await store.close()
        assert await other.get([one.task_id]) == {one.task_id: one}

    @law
    async def test_what_was_stored_outlives_the_backend(
        self, bench: StoreBench, restart: Callable[[], Awaitable[None]] | None
    ) -> None:
        if restart is None or not bench.capabilities.durable:
            return
        store, results = bench.store(), bench.results("1", "2")
        await store.put(results)
        await restart()
        assert await bench.store().get([r.task_id for r in results]) == {r.task_id: r for r in results}

    # --- waiting --------------------------------------------------------------------------------

    @law
    async def test_wait_finds_what_was_stored_before(self, bench: StoreBench) -> None:
        store, waiter, (one,) = bench.store(), bench.store(), bench.results("1")
        await store.put([one])
        assert await bench.soon(waiter.wait(one.task_id), "the record") == one

    @law
    async def test_wait_hears_of_what_is_stored_later(self, bench: StoreBench) -> None:
        store, waiter, (one,) = bench.store(), bench.store(), bench.results("1")
        waiting = asyncio.ensure_future(waiter.wait(one.task_id))
        await asyncio.sleep(bench.quiet)
        await store.put([one])
        assert await bench.soon(waiting, "the record") == one

    @law
    async def test_wait_waits_for_a_final_state(self, bench: StoreBench) -> None:
        store, one = bench.store(), bench.result("1", "FAILURE")
        waiting = asyncio.ensure_future(store.wait(one.task_id))
        for state in ("STARTED", "RETRY", "HALF WAY"):
            await store.put([attrs.evolve(one, state=state)])
        await asyncio.sleep(bench.quiet)
        assert not waiting.done(), "wait returned a state that is not final"
        await store.put([one])
        assert await bench.soon(waiting, "the final record") == one

    @law
    async def test_many_wait_at_once(self, bench: StoreBench) -> None:
        store, waiter = bench.store(), bench.store()
        results = bench.results(*(str(n) for n in range(500)))
        waiting = [asyncio.ensure_future(waiter.wait(result.task_id)) for result in results + results[:50]]
        await asyncio.sleep(0.01)
        for at in range(0, 500, 100):
            await store.put(results[at : at + 100])
        assert await bench.soon(asyncio.gather(*waiting), "all the records") == results + results[:50]

    @law
    async def test_a_cancelled_wait_harms_no_other(self, bench: StoreBench) -> None:
        store, waiter, (one,) = bench.store(), bench.store(), bench.results("1")
        kept = asyncio.ensure_future(waiter.wait(one.task_id))
        for turn in TURNS:
            assert await interrupt(waiter.wait(one.task_id), turn) is None
        await store.put([one])
        assert await bench.soon(kept, "the record") == one
        assert await bench.soon(waiter.wait(one.task_id), "the record, asked for again") == one

    @law
    async def test_a_wait_is_answered_at_once_where_the_store_pushes(self, bench: StoreBench) -> None:
        if not bench.capabilities.push:
            return  # it asks now and then, and says so
        store, waiter, took = bench.store(), bench.store(), []
        for result in bench.results(*"12345"):
            waiting = asyncio.ensure_future(waiter.wait(result.task_id))
            await asyncio.sleep(bench.quiet)
            begun = time.monotonic()
            await store.put([result])
            await bench.soon(waiting, "the record")
            took.append(time.monotonic() - begun)
        assert sorted(took)[2] < max(bench.quiet, 0.15), f"declared as pushed, heard after {took}"

    @law
    async def test_a_wait_outlives_a_lost_connection(
        self, bench: StoreBench, sever: Callable[[ResultStore], Awaitable[None]] | None
    ) -> None:
        if sever is None:
            return
        store, waiter, (one, two) = bench.store(), bench.store(), bench.results("1", "2")
        waiting = [asyncio.ensure_future(waiter.wait(result.task_id)) for result in (one, two)]
        await asyncio.sleep(bench.quiet)
        await sever(waiter)
        await store.put([one])  # perhaps before the connection is mended
        await asyncio.sleep(bench.quiet)
        await store.put([two])
        assert await bench.soon(asyncio.gather(*waiting), "both records") == [one, two]

    @law
    async def test_a_cancelled_put_can_be_repeated(self, bench: StoreBench) -> None:
        store = bench.store()
        results = bench.results(*(str(turn) for turn in TURNS))
        for turn, result in enumerate(results):
            await interrupt(store.put([result]), turn)
            await store.put([result])
            await interrupt(store.get([result.task_id]), turn)
        assert await store.get([result.task_id for result in results]) == {r.task_id: r for r in results}

    # --- the end --------------------------------------------------------------------------------

    @law
    async def test_close_is_harmless_unused_and_twice(self, bench: StoreBench) -> None:
        unused, used = bench.store(), bench.store()
        await unused.close()
        await unused.close()
        await used.put(bench.results("1"))
        await used.close()
        await used.close()

    @law
    async def test_close_ends_what_is_under_way(self, bench: StoreBench) -> None:
        store = bench.store()
        waiting = [asyncio.ensure_future(store.wait(bench.id(str(n)))) for n in range(20)]
        putting = asyncio.ensure_future(store.put(bench.results("other")))
        await asyncio.sleep(bench.quiet)
        await bench.soon(store.close(), "the end of close")
        await asyncio.wait([*waiting, putting], timeout=bench.patience)
        assert all(waiter.cancelled() for waiter in waiting), "pending waits are cancelled"
        assert putting.done()

    @law
    async def test_use_after_close_raises(self, bench: StoreBench) -> None:
        store: Any = bench.store()
        await store.put(bench.results("1"))
        await store.close()
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: store.put(bench.results("2")),
            lambda: store.get([bench.id("1")]),
            lambda: bench.soon(store.wait(bench.id("1")), "an error"),
            lambda: store.forget([bench.id("1")]),
        ]
        if bench.capabilities.join:
            calls += [
                lambda: store.join(bench.id("j"), {}, size=1, owner="me", lease=1),
                lambda: store.members(bench.id("j")),
                lambda: store.fired(bench.id("j"), "me"),
                store.unfired,
            ]
        if bench.capabilities.claim:
            calls += [
                lambda: store.claim(bench.id("c"), "me", lease=1),
                lambda: store.release(bench.id("c"), "me"),
                store.claims,
            ]
        if bench.capabilities.query:
            calls.append(store.query)
        for call in calls:
            with pytest.raises(ResultStoreUnavailable):
                await call()

    # --- leaks ----------------------------------------------------------------------------------

    async def _live(self, bench: StoreBench) -> None:
        store = bench.store()
        await store.put(bench.results("1"))
        await store.wait(bench.id("1"))
        await interrupt(store.wait(bench.id("never")), 20)
        await store.forget([bench.id("1")])
        await store.close()

    async def _leaks(self, bench: StoreBench, kind: str) -> None:
        await self._live(bench)  # what a process makes once is no leak
        before = Belongings.now()
        for _ in range(3):
            await self._live(bench)
        await bench.until(lambda: not before.left_over(kind), f"the end of all {kind}")

    @law
    async def test_no_task_is_left_behind(self, bench: StoreBench) -> None:
        await self._leaks(bench, "tasks")

    @law
    async def test_no_thread_is_left_behind(self, bench: StoreBench) -> None:
        await self._leaks(bench, "threads")

    @law
    async def test_no_file_or_socket_is_left_behind(self, bench: StoreBench) -> None:
        await self._leaks(bench, "files")
