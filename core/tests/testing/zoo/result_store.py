"""Wrong result stores."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
from attrs import evolve

from umbel.model import Lease, Result
from umbel.ports.clock import VirtualClock
from umbel.ports.result_store import JoinState, ResultStore
from umbel.testing.contracts import ResultStoreContract

from ..honest.result_store import HonestStore, Join, Memory, ModestReplies, ModestStore
from .house import MANY, House


class StoreCage(ResultStoreContract):
    driver: ClassVar[type[ModestStore]]
    lease, patience, quiet, time_limit, many = 5.0, 1.0, 0.02, 20.0, MANY

    @pytest.fixture
    def clock(self) -> VirtualClock:
        return VirtualClock()

    @pytest.fixture
    def make_store(self, clock: VirtualClock) -> Callable[[], ModestStore]:
        memory = Memory()
        return lambda: self.driver(memory, clock)

    @pytest.fixture
    def sever(self) -> Callable[[ResultStore], Awaitable[None]]:
        async def cut(store: ResultStore) -> None:
            if isinstance(store, HonestStore):
                store.sever()

        return cut

    @pytest.fixture
    def restart(self, make_store: Callable[[], ModestStore]) -> Callable[[], Awaitable[None]]:
        async def again() -> None:
            driver = make_store()
            if isinstance(driver, HonestStore):
                driver.restart()

        return again


HOUSE = House(__file__, StoreCage, ModestStore, ModestReplies, HonestStore)


@HOUSE.breaks("a_final_state_never_changes")
class OverwritesFinalStates(HonestStore):
    def settled(self, result: Result) -> bool:
        return super().settled(result) and not (result.document == b"late" and result.state == "REVOKED")


@HOUSE.breaks("a_record_comes_back_whole[0]")
class RefusesNothingness(HonestStore):
    async def put(self, results: Sequence[Result]) -> None:
        await super().put([evolve(result, document=result.document or b"null") for result in results])


@HOUSE.breaks("a_later_state_replaces_an_earlier_one", "the_later_of_one_call_wins")
class KeepsTheFirst(HonestStore):
    def settled(self, result: Result) -> bool:
        known = self.live(result.task_id)
        return super().settled(result) or (known is not None and known.state == "RECEIVED" and not result.final)


@HOUSE.breaks("forgotten_is_gone")
class ForgetsNothing(HonestStore):
    async def forget(self, task_ids: Sequence[str]) -> None:
        await self.enter()


@HOUSE.breaks("records_expire")
class NeverExpires(HonestStore):
    def live(self, task_id: str) -> Result | None:
        return self.memory.records.get(task_id, (None, 0.0))[0]


@HOUSE.breaks("thousands_of_records_are_kept")
class LosesOneRecordOfMany(HonestStore):
    async def put(self, results: Sequence[Result]) -> None:
        await super().put(results[:-1] if len(results) == MANY // 12 else results)


@HOUSE.breaks("wait_waits_for_a_final_state")
class WakesTooSoon(HonestStore):
    def wakes(self, result: Result) -> bool:
        return True


@HOUSE.breaks(
    "wait_hears_of_what_is_stored_later",
    "many_wait_at_once",
    "a_cancelled_wait_harms_no_other",
    "a_wait_is_answered_at_once_where_the_store_pushes",
    "a_wait_outlives_a_lost_connection",
)
class HearsOnlyItself(HonestStore):
    stored: bool = False

    async def put(self, results: Sequence[Result]) -> None:
        self.stored = True
        await super().put(results)

    def wakes(self, result: Result) -> bool:
        return super().wakes(result) and (self.stored or result.task_id not in self.awaited)

    async def wait(self, task_id: str) -> Result:
        if self.live(task_id) is None:
            self.awaited = {*self.awaited, task_id}
        return await super().wait(task_id)

    awaited: frozenset[str] | set[str] = frozenset()


@HOUSE.breaks("a_cancelled_wait_harms_no_other")
class CancelsAllWhoWait(HonestStore):
    async def wait(self, task_id: str) -> Result:
        try:
            return await super().wait(task_id)
        except asyncio.CancelledError:
            if not self.closed:
                for task in self.waiting:
                    task.cancel()
            raise


@HOUSE.breaks("close_ends_what_is_under_way")
class LeavesThemWaiting(HonestStore):
    async def close(self) -> None:
        self.closed = True


@HOUSE.breaks("use_after_close_raises")
class StoresAfterClose(HonestStore):
    async def put(self, results: Sequence[Result]) -> None:
        if not self.closed:
            await super().put(results)


@HOUSE.breaks("no_task_is_left_behind")
class StoreLeaksATask(HonestStore):
    async def close(self) -> None:
        if not self.closed:
            self.task = asyncio.ensure_future(asyncio.sleep(3600))
        await super().close()


@HOUSE.breaks(
    "a_join_fires_once_among_many",
    "the_right_to_fire_passes_on_when_its_lease_ends",
    "the_holder_of_the_right_who_asks_again_is_told_again",
    "the_right_to_fire_stays_with_its_holder_until_another_takes_it",
)
class FiresTwice(HonestStore):
    def fires(self, join: Join) -> bool:
        return join.size is not None and len(join.marks) >= join.size and not join.fired


@HOUSE.breaks("what_has_fired_never_fires_again", "the_holder_of_the_right_who_asks_again_is_told_again")
class FiresAgain(HonestStore):
    async def fired(self, key: str, owner: str) -> bool:
        done = await super().fired(key, owner)
        self.memory.joins[key].fired = False
        return done


@HOUSE.breaks("the_right_to_fire_passes_on_when_its_lease_ends")
class FiresNeverIfItsHolderDies(HonestStore):
    def fires(self, join: Join) -> bool:
        return super().fires(join) and not join.owner


@HOUSE.breaks("a_join_counts_each_member_once")
class ReplacesMarks(HonestStore):
    async def join(self, key: str, marks: Mapping[str, bytes], **arguments: Any) -> JoinState:
        state = await super().join(key, marks, **arguments)
        self.memory.joins[key].marks.update(marks)
        return state


@HOUSE.breaks("a_join_without_a_size_waits_for_it")
class GuessesTheSize(HonestStore):
    def fires(self, join: Join) -> bool:
        guess = join.size if join.size is not None or len(join.marks) < 3 else len(join.marks)
        return super().fires(evolve(join, size=guess))


@HOUSE.breaks("the_right_to_fire_passes_on_when_its_lease_ends", "what_has_fired_never_fires_again")
class LetsAnybodyFire(HonestStore):
    def may_fire(self, join: Join, owner: str) -> bool:
        return bool(join.owner)


@HOUSE.breaks("a_claim_is_held_by_one")
class LetsTwoClaim(HonestStore):
    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        held = await super().claim(name, owner, lease=lease, value=value)
        return evolve(held, owner=owner) if owner == "owner-7" else held


@HOUSE.breaks(
    "a_claim_whose_lease_has_ended_passes_on_with_a_higher_fence",
    "a_claim_taken_anew_by_the_same_owner_has_a_higher_fence",
    "a_released_claim_is_free",
)
class NeverRaisesTheFence(HonestStore):
    def next_fence(self, former: Lease | None) -> int:
        return 1


@HOUSE.breaks("a_released_claim_is_free", "a_claim_whose_lease_has_ended_passes_on_with_a_higher_fence")
class ReleasesForAnybody(HonestStore):
    def may_release(self, held: Lease, owner: str) -> bool:
        return True


@HOUSE.breaks("a_claim_is_released_only_with_the_value_asked_for")
class ReleasesWithAnyValue(HonestStore):
    async def release(self, name: str, owner: str, *, value: bytes | None = None) -> bool:
        return await super().release(name, owner)


@HOUSE.breaks("a_passing_state_that_comes_late_changes_nothing")
class GoesBack(HonestStore):
    def settled(self, result: Result) -> bool:
        known = self.live(result.task_id)
        return known is not None and known.final


@HOUSE.breaks("claims_lists_what_holds_now")
class ListsWhatHasEnded(HonestStore):
    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        await self.enter()
        return [held for name, held in self.memory.claims.items() if name.startswith(prefix)]


@HOUSE.breaks("records_are_found_by_state_newest_first")
class FindsTheOldestFirst(HonestStore):
    def newest_first(self) -> Sequence[tuple[Result, float]]:
        return list(self.memory.records.values())


@HOUSE.breaks("a_driver_says_what_it_is")
class HidesItsQueries(HonestStore):
    capabilities = evolve(HonestStore.capabilities, query=False)


@HOUSE.breaks("a_record_comes_back_whole")
class ForgetsTheContentType(HonestStore):
    async def put(self, results: Sequence[Result]) -> None:
        await super().put([evolve(result, content_type="application/json") for result in results])


@HOUSE.breaks("get_gives_those_there_are")
class RaisesWhereThereIsNothing(HonestStore):
    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        found = await super().get(task_ids)
        if task_ids and not found:
            raise KeyError(task_ids[0])
        return found


@HOUSE.breaks("nothing_asked_is_nothing_done")
class AsksForAtLeastOne(HonestStore):
    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        return {task_ids[0]: {}, **await super().get(task_ids)} if not task_ids else await super().get(task_ids)


@HOUSE.breaks("what_was_stored_outlives_its_connection")
class TakesItsRecordsAlong(HonestStore):
    own: frozenset[str] = frozenset()

    async def put(self, results: Sequence[Result]) -> None:
        await super().put(results)
        self.own |= {result.task_id for result in results}

    async def close(self) -> None:
        for task_id in self.own:
            self.memory.records.pop(task_id, None)
        await super().close()


@HOUSE.breaks("what_was_stored_outlives_the_backend")
class KeepsRecordsInMemoryOnly(HonestStore):
    def restart(self) -> None:
        self.memory.records.clear()


@HOUSE.breaks("wait_finds_what_was_stored_before")
class DoesNotLookBack(HonestStore):
    """It listens, and asks for nothing that others stored before it did."""

    heard: frozenset[str] = frozenset()

    async def put(self, results: Sequence[Result]) -> None:
        self.heard |= {result.task_id for result in results}
        await super().put(results)

    async def wait(self, task_id: str) -> Result:
        if self.live(task_id) is None:
            self.heard |= {task_id}
        return await super().wait(task_id)

    def wakes(self, result: Result) -> bool:
        return super().wakes(result) and result.task_id in self.heard


@HOUSE.breaks("a_wait_is_answered_at_once_where_the_store_pushes")
class PollsInstead(HonestStore):
    async def pause(self) -> None:
        await asyncio.sleep(0.25)


@HOUSE.breaks("a_wait_outlives_a_lost_connection")
class DeafAfterALostConnection(HonestStore):
    deaf: bool = False

    def sever(self) -> None:
        self.deaf = True

    def wakes(self, result: Result) -> bool:
        return super().wakes(result) and not self.deaf


@HOUSE.breaks("a_cancelled_put_can_be_repeated")
class RemembersWhatItHasNotStored(HonestStore):
    sent: frozenset[Result] = frozenset()

    async def put(self, results: Sequence[Result]) -> None:
        fresh = [result for result in results if result not in self.sent]
        self.sent |= {result for result in results if result.final}
        await asyncio.sleep(0.0005)
        await super().put(fresh)


@HOUSE.breaks("close_is_harmless_unused_and_twice")
class StoreClosesOnce(HonestStore):
    used: bool = False

    async def enter(self) -> None:
        self.used = True
        await super().enter()

    async def close(self) -> None:
        if self.closed and not self.used:
            raise RuntimeError("closed already")
        await super().close()


@HOUSE.breaks("use_after_close_raises")
class ClaimsAfterClose(HonestStore):
    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        return [] if self.closed else await super().claims(prefix)


@HOUSE.breaks("no_thread_is_left_behind")
class StoreLeaksAThread(HonestStore):
    async def close(self) -> None:
        if not self.closed:
            threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
        await super().close()


@HOUSE.breaks("no_file_or_socket_is_left_behind")
class StoreLeaksAFile(HonestStore):
    async def close(self) -> None:
        if not self.closed:
            os.open(os.devnull, os.O_RDONLY)
        await super().close()


@HOUSE.breaks("a_join_that_is_not_complete_is_not_to_be_fired")
class FindsTheUnfinished(HonestStore):
    async def unfired(self, limit: int = 100) -> Sequence[str]:
        await self.enter()
        now, joins = self.clock.time(), self.memory.joins.items()
        return [key for key, join in joins if not join.fired and join.until <= now][:limit]


@HOUSE.breaks("a_join_may_be_forgotten_some_time_after_its_last_mark")
class ForgetsAllJoinsAtOnce(HonestStore):
    end: float = float("inf")

    async def join(
        self, key: str, marks: Mapping[str, bytes], *, expires: float | None = None, **more: Any
    ) -> JoinState:
        self.end = self.end if expires is None else min(self.end, self.clock.time() + expires)
        return await super().join(key, marks, **more)

    async def members(self, key: str) -> Mapping[str, bytes]:
        return {} if self.end < self.clock.time() else await super().members(key)


@HOUSE.breaks("the_holder_of_the_right_who_asks_again_is_told_again")
class TellsOnce(HonestStore):
    def fires_again(self, join: Join, owner: str) -> bool:
        return False


@HOUSE.breaks("a_claim_taken_anew_by_the_same_owner_has_a_higher_fence")
class KnowsItsOwnerAgain(HonestStore):
    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        before = self.memory.claims.get(name)
        held = await super().claim(name, owner, lease=lease, value=value)
        if before is not None and before.owner == owner == held.owner:
            held = self.memory.claims[name] = evolve(held, fence=before.fence)
        return held


@HOUSE.breaks("a_renewal_without_a_value_keeps_it")
class EmptiesTheValue(HonestStore):
    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        return await super().claim(name, owner, lease=lease, value=value or b"")


@HOUSE.breaks("the_right_to_fire_stays_with_its_holder_until_another_takes_it")
class RefusesTheFormerHolder(HonestStore):
    async def join(self, key: str, marks: Mapping[str, bytes], *, owner: str, **more: Any) -> JoinState:
        join = self.memory.joins.get(key, Join())
        lapsed = join.owner == owner and join.until <= self.clock.time()
        state = await super().join(key, marks, owner=owner, **more)
        return evolve(state, fires=state.fires and not lapsed)


@HOUSE.breaks("the_first_final_state_of_one_call_stays", "a_passing_state_that_comes_late_changes_nothing")
class KeepsTheLastOfOneCall(HonestStore):
    async def put(self, results: Sequence[Result]) -> None:
        await super().put(list({result.task_id: result for result in results}.values()))


@HOUSE.breaks("a_claim_is_renewed_by_its_owner", "a_renewal_without_a_value_keeps_it")
class RenewsNoClaim(HonestStore):
    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        held = self.memory.claims.get(name)
        if held is not None and held.owner == owner and held.until > self.clock.time():
            return held
        return await super().claim(name, owner, lease=lease, value=value)


# --- what it does not declare, it does not do ---


@HOUSE.breaks("records_expire")
class ExpiresUndeclared(ModestStore):
    def live(self, task_id: str) -> Result | None:
        record, end = self.memory.records.get(task_id, (None, 0.0))
        return record if end > self.clock.time() else None


globals().update(HOUSE.tests())
