"""The rate of a fleet, as a log of claims: exact, whoever asks, whatever gets lost."""

from __future__ import annotations

import asyncio
import heapq
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.errors import ResultStoreUnavailable
from umbel.ports.clock import VirtualClock
from umbel.worker import fleet_rate
from umbel.worker.fleet_rate import FleetRate

from .claims import Claims

NOON = 1_800_000_000.0


def fleet(store: Claims[VirtualClock], rate: float, number: int = 1) -> list[FleetRate]:
    return [FleetRate(store, "shop.job", rate, owner=f"w{n}", clock=store.clock) for n in range(number)]


def test_a_second_s_worth_is_there_at_once_and_then_what_the_rate_adds() -> None:
    async def main() -> None:
        store = Claims(VirtualClock(NOON))
        one, two = fleet(store, 10, 2)
        assert await one.take(4) == 4
        assert await two.take(20) == 6
        assert await one.take(1) == 0
        store.clock.advance(0.31)
        assert await one.take(20) == 3
        assert await two.take(20) == 0

    asyncio.run(main())


def test_nothing_is_asked_of_the_store_while_it_is_known_that_nothing_is_left() -> None:
    async def main() -> None:
        store = Claims(VirtualClock(NOON))
        (one,) = fleet(store, 1)
        assert await one.take(1) == 1
        asked = len(store.calls)
        assert [await one.take(5) for _ in range(10)] == [0] * 10
        assert len(store.calls) == asked

    asyncio.run(main())


def test_one_call_takes_many_starts() -> None:
    async def main() -> None:
        store = Claims(VirtualClock(NOON))
        (one,) = fleet(store, 1000)
        assert await one.take(1000) == 1000
        assert store.calls == ["claims", "claim"]

    asyncio.run(main())


def test_a_fleet_that_is_started_anew_goes_on_where_it_was() -> None:
    async def main() -> None:
        store = Claims(VirtualClock(NOON))
        assert await fleet(store, 5 / 3600)[0].take(3) == 1
        for minutes, number in ((0, 0), (6, 0), (5, 0), (1.1, 1)):
            store.clock.advance(60 * minutes)
            assert await fleet(store, 5 / 3600)[0].take(3) == number

    asyncio.run(main())


def test_an_answer_that_is_lost_costs_its_starts_and_no_more() -> None:
    async def main() -> None:
        store = Claims(VirtualClock(NOON))
        one, two = fleet(store, 10, 2)
        store.lose_answers = 1
        with pytest.raises(ResultStoreUnavailable):
            await one.take(4)
        assert await one.take(20) == 6
        assert await two.take(20) == 0

    asyncio.run(main())


def test_a_worker_that_slept_looks_where_the_log_ends() -> None:
    """Entries that have ended may be claimed anew: an old place must not be gone on from."""

    async def main() -> None:
        store = Claims(VirtualClock(NOON))
        one, two = fleet(store, 1, 2)
        for _ in range(3):
            assert await one.take(1) == 1
            store.clock.advance(1.001)
        for _ in range(200):
            assert await two.take(1) == 1
            assert await one.take(1) == 0 or store.clock.time() < NOON + 30
            store.clock.advance(1.001)

    asyncio.run(main())


def test_an_answer_that_took_too_long_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        store = Claims(VirtualClock(NOON))
        one, two = fleet(store, 1, 2)
        assert await one.take(1) == 1
        store.clock.advance(1.5)
        real, late = time.monotonic, 0.0
        monkeypatch.setattr(fleet_rate.time, "monotonic", lambda: real() + late)
        asking = asyncio.create_task(one.take(1))
        await asyncio.sleep(0)
        late = fleet_rate._FRESH + 1
        assert await asking == 1
        assert store.calls[-4:] == ["claim", "release", "claims", "claim"]
        assert await two.take(1) == 0

    asyncio.run(main())


def test_a_rate_that_is_raised_does_not_wait_for_what_was_slow() -> None:
    async def main() -> None:
        store = Claims(VirtualClock(NOON))
        one, two = fleet(store, 5 / 3600, 2)
        assert await one.take(1) == 1
        for each in (one, two):
            each.change(10)
        assert await one.take(1) == 0
        store.clock.advance(fleet_rate._SKEW + 1.1)
        assert await one.take(1) + await two.take(1) >= 1

    asyncio.run(main())


def test_a_clock_that_is_set_back_holds_nothing_up_for_long() -> None:
    async def main() -> None:
        store = Claims(VirtualClock(NOON))
        (one,) = fleet(store, 1)
        assert await one.take(1) == 1
        store.clock.set(NOON - 90)
        assert 0 < one.put_off("a") < 10
        store.clock.advance(fleet_rate._SKEW + 1.1)
        assert await one.take(1) == 1

    asyncio.run(main())


def test_a_claim_of_somebody_else_s_is_an_error_that_names_it() -> None:
    async def main() -> None:
        store = Claims(VirtualClock(NOON))
        (one,) = fleet(store, 1)
        await store.claim("rate:shop.job:0", "somebody", lease=60, value=b"?")
        with pytest.raises(ResultStoreUnavailable, match=r"claim 'rate:shop\.job:0' .* none of ours"):
            await one.take(1)

    asyncio.run(main())


def test_those_that_wait_come_one_after_another_and_keep_their_turn() -> None:
    async def main() -> None:
        store = Claims(VirtualClock(NOON))
        (one,) = fleet(store, 0.1)
        assert await one.take(1) == 1
        assert [one.put_off(name) for name in "abc"] == pytest.approx([10, 20, 30])
        assert [one.put_off(f"d{n}") for n in range(10)][-1] == fleet_rate._LONGEST
        store.clock.advance(5)
        assert one.put_off("b") == pytest.approx(15)

    asyncio.run(main())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), workers=st.integers(1, 5), rate=st.sampled_from([0.5, 2.0, 10.0]))
def test_however_many_ask_the_rate_is_kept_and_used_up(seed: int, workers: int, rate: float) -> None:
    """Messages go to any worker, and come back when they are told to."""
    chance = random.Random(seed)
    store = Claims(VirtualClock(NOON))
    limiters = fleet(store, rate, workers)
    seconds, starts = 15.0, []
    due = [(NOON + chance.random(), n) for n in range(int(rate * seconds * 2))]
    heapq.heapify(due)

    async def ask(worker: FleetRate, names: list[int]) -> None:
        number = await worker.take(len(names))
        starts.extend([store.clock.time()] * number)
        for name in names[number:]:
            again = store.clock.time() + worker.put_off(str(name)) + chance.random() * 0.005
            heapq.heappush(due, (again, name))

    async def main() -> None:
        while due and due[0][0] < NOON + seconds:
            store.clock.set(due[0][0])
            asked: dict[int, list[int]] = {}
            while due and due[0][0] <= store.clock.time() + 0.01:
                asked.setdefault(chance.randrange(workers), []).append(heapq.heappop(due)[1])
            await asyncio.gather(*(ask(limiters[worker], names) for worker, names in asked.items()))

    asyncio.run(main())
    burst = max(1.0, rate)
    for first, start in enumerate(starts):
        for last in range(first, len(starts)):
            assert last - first + 1 <= burst + (starts[last] - start) * rate + 0.1
    assert len(starts) >= 0.85 * rate * seconds
