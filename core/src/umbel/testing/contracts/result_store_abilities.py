"""Laws of the abilities ``join``, ``claim`` and ``query`` of a result store.

A store that does not declare an ability does not have its methods; ``test_a_driver_says_what_it_is`` tests that, and these
laws hold of themselves.
"""

from __future__ import annotations

import asyncio
from typing import Final, cast

from umbel.ports.result_store import ClaimStore, JoinStore, QueryableStore
from umbel.testing.contracts.bench import AMPLE, law
from umbel.testing.contracts.result_store_bench import StoreBench

LONG: Final = 3600.0


class AbilityLaws:
    """Groups are joined once, claims are held by one, and records are found by state."""

    # --- join -----------------------------------------------------------------------------------

    @law
    async def test_a_join_counts_each_member_once(self, bench: StoreBench) -> None:
        if not bench.capabilities.join:
            return
        one, other, key = _joins(bench), _joins(bench), bench.id("join")
        first = await one.join(key, {"a": b"1", "ü": b"\x00\xff"}, size=4, owner="x", lease=LONG)
        again = await other.join(key, {"a": b"changed", "b": b""}, size=None, owner="y", lease=LONG)
        assert [(state.count, state.size, state.fires) for state in (first, again)] == [(2, 4, False), (3, 4, False)]
        assert await one.members(key) == {"a": b"1", "ü": b"\x00\xff", "b": b""}
        assert await one.members(bench.id("none")) == {}

    @law
    async def test_a_join_fires_once_among_many(self, bench: StoreBench) -> None:
        if not bench.capabilities.join:
            return
        machines, key = [_joins(bench), _joins(bench)], bench.id("join")
        states = await asyncio.gather(
            *(machines[n % 2].join(key, {str(n % 40): b""}, size=40, owner=f"owner-{n}", lease=LONG) for n in range(80))
        )
        assert sum(state.fires for state in states) == 1
        assert {state.fires for state in states if state.count < 40} <= {False}
        late = await machines[0].join(key, {"0": b""}, size=40, owner="late", lease=LONG)
        assert (late.count, late.fires) == (40, False)

    @law
    async def test_a_join_without_a_size_waits_for_it(self, bench: StoreBench) -> None:
        if not bench.capabilities.join:
            return
        store, key = _joins(bench), bench.id("join")
        for member in "abc":
            state = await store.join(key, {member: b""}, size=None, owner=member, lease=LONG)
            assert (state.size, state.fires) == (None, False)
        state = await store.join(key, {}, size=3, owner="last", lease=LONG)
        assert (state.count, state.size, state.fires) == (3, 3, True)

    @law
    async def test_the_right_to_fire_passes_on_when_its_lease_ends(self, bench: StoreBench) -> None:
        if not bench.capabilities.join:
            return
        store, other, key = _joins(bench), _joins(bench), bench.id("join")
        assert (await store.join(key, {"a": b""}, size=1, owner="dead", lease=bench.lease * AMPLE)).fires
        assert not (await other.join(key, {"a": b""}, size=None, owner="early", lease=LONG)).fires
        assert key not in await other.unfired(10_000)
        await bench.lease_ends(AMPLE)
        assert key in await other.unfired(10_000)
        assert (await other.join(key, {}, size=None, owner="heir", lease=LONG)).fires
        assert key not in await other.unfired(10_000)
        assert not await store.fired(key, "dead")
        assert await other.fired(key, "heir")

    @law
    async def test_the_holder_of_the_right_who_asks_again_is_told_again(self, bench: StoreBench) -> None:
        """Its first answer may have been lost, with the connection that it was to come by."""
        if not bench.capabilities.join:
            return
        store, key = _joins(bench), bench.id("join")
        for _ in range(3):
            state = await store.join(key, {"a": b""}, size=1, owner="x", lease=LONG)
            assert (state.count, state.fires) == (1, True)
        assert not (await store.join(key, {"a": b""}, size=1, owner="y", lease=LONG)).fires
        assert await store.fired(key, "x")
        assert not (await store.join(key, {"a": b""}, size=1, owner="x", lease=LONG)).fires

    @law
    async def test_the_right_to_fire_stays_with_its_holder_until_another_takes_it(self, bench: StoreBench) -> None:
        if not bench.capabilities.join:
            return
        store, other, key = _joins(bench), _joins(bench), bench.id("join")
        assert (await store.join(key, {"a": b""}, size=1, owner="slow", lease=bench.lease)).fires
        await bench.lease_ends()
        assert (await store.join(key, {}, size=None, owner="slow", lease=LONG)).fires
        assert not (await other.join(key, {}, size=None, owner="heir", lease=LONG)).fires, "the lease begins anew"
        assert await store.fired(key, "slow")

    @law
    async def test_what_has_fired_never_fires_again(self, bench: StoreBench) -> None:
        if not bench.capabilities.join:
            return
        store, key = _joins(bench), bench.id("join")
        assert (await store.join(key, {"a": b""}, size=1, owner="x", lease=bench.lease)).fires
        assert await store.fired(key, "x")
        await bench.lease_ends()
        assert key not in await store.unfired(10_000)
        for owner in ("x", "y"):
            assert not (await store.join(key, {"b": b""}, size=1, owner=owner, lease=LONG)).fires
        assert not await store.fired(key, "y")

    @law
    async def test_a_join_that_is_not_complete_is_not_to_be_fired(self, bench: StoreBench) -> None:
        if not bench.capabilities.join:
            return
        store, key = _joins(bench), bench.id("join")
        await store.join(key, {"a": b""}, size=2, owner="x", lease=bench.lease)
        await bench.lease_ends()
        assert key not in await store.unfired(10_000)
        assert not await store.fired(key, "x")

    @law
    async def test_a_join_may_be_forgotten_some_time_after_its_last_mark(self, bench: StoreBench) -> None:
        if not bench.capabilities.join:
            return
        store, short, long = _joins(bench), bench.id("short"), bench.id("long")
        for key, expires in ((short, bench.lease), (long, LONG)):
            await store.join(key, {"a": b""}, size=2, owner="x", lease=LONG, expires=expires)
        await bench.lease_ends()
        assert await store.members(long) == {"a": b""}
        assert (await store.join(long, {"b": b""}, size=None, owner="x", lease=LONG)).fires
        assert await store.members(short) in ({}, {"a": b""})

    # --- claim ----------------------------------------------------------------------------------

    @law
    async def test_a_claim_is_held_by_one(self, bench: StoreBench) -> None:
        if not bench.capabilities.claim:
            return
        machines, name = [_claims(bench), _claims(bench)], bench.id("ü lock")
        leases = await asyncio.gather(*(machines[n % 2].claim(name, f"owner-{n}", lease=LONG) for n in range(40)))
        assert len({(lease.owner, lease.fence) for lease in leases}) == 1
        mine = await machines[0].claim(bench.id("other"), "me", lease=100, value=b"\x00v")
        assert (mine.name, mine.owner, mine.value) == (bench.id("other"), "me", b"\x00v")
        assert bench.now() + 98 <= mine.until <= bench.now() + 101
        theirs = await machines[1].claim(bench.id("other"), "you", lease=LONG, value=b"w")
        assert theirs == mine

    @law
    async def test_a_claim_is_renewed_by_its_owner(self, bench: StoreBench) -> None:
        if not bench.capabilities.claim:
            return
        store, name = _claims(bench), bench.id("lock")
        first = await store.claim(name, "me", lease=bench.lease * AMPLE, value=b"1")
        renewed = await store.claim(name, "me", lease=LONG, value=b"2")
        assert (renewed.owner, renewed.fence, renewed.value) == ("me", first.fence, b"2")
        assert renewed.until > first.until
        await bench.lease_ends(AMPLE)
        assert (await store.claim(name, "you", lease=LONG)).owner == "me"

    @law
    async def test_a_renewal_without_a_value_keeps_it(self, bench: StoreBench) -> None:
        if not bench.capabilities.claim:
            return
        store, name = _claims(bench), bench.id("lock")
        await store.claim(name, "me", lease=bench.lease, value=b"\x00v")
        assert (await store.claim(name, "me", lease=LONG)).value == b"\x00v"
        assert [lease.value for lease in await store.claims(name)] == [b"\x00v"]
        assert (await store.claim(name, "me", lease=LONG, value=b"")).value == b"", "an empty value is one"
        await store.claim(name, "me", lease=LONG, value=b"w")
        await store.release(name, "me")
        assert (await store.claim(name, "me", lease=LONG)).value == b"", "taken anew, it has no value"

    @law
    async def test_a_claim_whose_lease_has_ended_passes_on_with_a_higher_fence(self, bench: StoreBench) -> None:
        if not bench.capabilities.claim:
            return
        store, name = _claims(bench), bench.id("lock")
        first = await store.claim(name, "me", lease=bench.lease)
        await bench.lease_ends()
        second = await store.claim(name, "you", lease=LONG)
        assert second.owner == "you"
        assert second.fence > first.fence
        assert not await store.release(name, "me")
        assert (await store.claim(name, "me", lease=LONG)).owner == "you"

    @law
    async def test_a_claim_taken_anew_by_the_same_owner_has_a_higher_fence(self, bench: StoreBench) -> None:
        """What was done under the ended lease is told apart from what is done under the new one."""
        if not bench.capabilities.claim:
            return
        store, name = _claims(bench), bench.id("lock")
        first = await store.claim(name, "me", lease=bench.lease)
        await bench.lease_ends()
        again = await store.claim(name, "me", lease=LONG)
        assert again.owner == "me"
        assert again.fence > first.fence
        await store.release(name, "me")
        assert (await store.claim(name, "me", lease=LONG)).fence > again.fence

    @law
    async def test_a_released_claim_is_free(self, bench: StoreBench) -> None:
        if not bench.capabilities.claim:
            return
        store, other, name = _claims(bench), _claims(bench), bench.id("lock")
        first = await store.claim(name, "me", lease=LONG)
        assert not await other.release(name, "you")
        assert await store.release(name, "me")
        assert not await store.release(name, "me")
        second = await other.claim(name, "you", lease=LONG)
        assert second.owner == "you"
        assert second.fence > first.fence

    @law
    async def test_a_claim_is_released_only_with_the_value_asked_for(self, bench: StoreBench) -> None:
        if not bench.capabilities.claim:
            return
        store, other, name = _claims(bench), _claims(bench), bench.id("lock")
        await store.claim(name, "me", lease=LONG, value=b"\x00new")
        assert not await other.release(name, "me", value=b"old")
        assert (await other.claim(name, "you", lease=LONG)).owner == "me"
        assert await other.release(name, "me", value=b"\x00new")
        await store.claim(name, "me", lease=LONG)
        assert await other.release(name, "me", value=b"")

    @law
    async def test_claims_lists_what_holds_now(self, bench: StoreBench) -> None:
        if not bench.capabilities.claim:
            return
        store = _claims(bench)
        held = [await store.claim(bench.id(name), "me", lease=LONG, value=b"v") for name in ("a%1", "a%2")]
        await store.claim(bench.id("b"), "me", lease=LONG)
        await store.claim(bench.id("a%ended"), "me", lease=bench.lease)
        await store.claim(bench.id("a%released"), "me", lease=LONG)
        await store.release(bench.id("a%released"), "me")
        await bench.lease_ends()
        assert sorted(await store.claims(bench.id("a%")), key=lambda lease: lease.name) == held
        assert {lease.name for lease in await store.claims()} >= {bench.id("a%1"), bench.id("a%2"), bench.id("b")}
        assert list(await store.claims(bench.id("A"))) == []

    # --- query ----------------------------------------------------------------------------------

    @law
    async def test_records_are_found_by_state_newest_first(self, bench: StoreBench) -> None:
        if not bench.capabilities.query:
            return
        store, state = bench.store(), bench.id("state")
        query = cast("QueryableStore", store).query
        for number in range(6):
            await store.put([bench.result(str(number), state if number % 2 else f"{state} other")])
        await store.put([bench.result("1", state, b"newer")])
        expected = [bench.id(name) for name in ("1", "5", "3")]
        assert [result.task_id for result in await query(state=state)] == expected
        assert [result.task_id for result in await query(state=state, limit=1, offset=1)] == expected[1:2]
        every = [result.task_id for result in await query(limit=10_000) if result.task_id.startswith(bench.prefix)]
        assert every == [bench.id(name) for name in ("1", "5", "4", "3", "2", "0")]
        assert list(await query(state=bench.id("none"))) == []


def _joins(bench: StoreBench) -> JoinStore:
    return cast("JoinStore", bench.store())


def _claims(bench: StoreBench) -> ClaimStore:
    return cast("ClaimStore", bench.store())
