"""How many slots a load asks for: a table, what holds always, and a worker that follows it."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.errors import NotSupported, SettingsError
from umbel.worker import autoscale
from umbel.worker.autoscale import Bounds, Load, Memory, decide

from .conftest import MakeApp
from .fakes import Fakes, eventually, never, running

BOUNDS = Bounds(least=2, most=16, idle=30.0)


@pytest.mark.parametrize(
    ("load", "slots", "wanted"),
    [
        (Load(running=4), 4, 4),
        (Load(running=4, waiting=1), 4, 5),
        (Load(running=4, backlog=2), 4, 6),
        (Load(running=4, backlog=100), 4, 8),
        (Load(running=8, backlog=100), 8, 16),
        (Load(running=16, backlog=100), 16, 16),
        (Load(running=4, backlog=9, waited=6.0), 4, 13),
        (Load(running=4, backlog=100, waited=60.0), 4, 16),
        (Load(running=3, backlog=100), 4, 4),
        (Load(running=0), 4, 4),
        (Load(running=0), 1, 2),
        (Load(running=0), 40, 16),
    ],
)
def test_one_look(load: Load, slots: int, wanted: int) -> None:
    assert decide(load, BOUNDS, Memory(slots), 1000.0).slots == wanted


def looks(loads: list[Load], slots: int, *, every: float = 1.0) -> list[int]:
    memory, seen = Memory(slots), []
    for number, load in enumerate(loads):
        memory = decide(load, BOUNDS, memory, 1000.0 + number * every)
        seen.append(memory.slots)
    return seen


def test_slots_are_taken_away_after_a_time_of_too_many_down_to_what_was_needed_in_it() -> None:
    loads = [Load(running=3)] * 10 + [Load(running=5)] + [Load(running=1)] * 60
    assert looks(loads, 12) == [12] * 30 + [5] * 30 + [2] * 11


def test_one_look_at_which_all_were_busy_begins_the_time_anew() -> None:
    assert set(looks(([Load(running=0)] * 25 + [Load(running=8)]) * 5, 8)) == {8}


def test_a_number_that_somebody_else_has_set_out_of_bounds_is_brought_back() -> None:
    memory = decide(Load(running=0), BOUNDS, evolve(Memory(4), slots=20), 1000.0)
    assert memory.slots == 16


@settings(deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 500), st.floats(0, 100)), max_size=80
    ),
    least=st.integers(1, 5),
    room=st.integers(0, 10),
    slots=st.integers(1, 30),
)
def test_the_bounds_hold_whatever_comes(steps: Any, least: int, room: int, slots: int) -> None:
    bounds, memory = Bounds(least=least, most=least + room, idle=5.0), Memory(slots)
    for now, (runs, waiting, backlog, waited) in enumerate(steps):
        busy = min(runs, memory.slots)
        load = Load(running=busy, waiting=waiting, backlog=backlog, waited=waited)
        after = decide(load, bounds, memory, float(now))
        assert bounds.least <= after.slots <= bounds.most
        if bounds.least <= memory.slots <= bounds.most:
            assert not (after.slots > memory.slots and busy < memory.slots)
            assert not (after.slots < memory.slots and busy == memory.slots)
            assert after.slots >= min(busy, bounds.most)
        memory = after


# --- a worker -------------------------------------------------------------------------------------


def test_a_worker_grows_with_what_waits_and_shrinks_again(
    make_app: MakeApp, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autoscale, "EVERY", 0.02)
    app = make_app(
        {"worker.pool": "manual", "worker.concurrency": None, "worker.autoscale_max": 5, "worker.autoscale_idle": 0.3}
    )
    job = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        assert run.worker.concurrency == 1
        assert run.worker.operations.stats()["autoscaler"] == {"min": 1, "max": 5, "current": 1}
        job.map_delay([()] * 20)
        eventually(lambda: run.worker.concurrency == 5)
        eventually(lambda: len(fakes.pool.busy) == 5)
        while not fakes.broker.empty:
            for waiting in list(fakes.pool.busy.values()):
                fakes.pool.run(waiting)
        eventually(lambda: run.worker.concurrency == 1)
        assert never(lambda: run.worker.concurrency != 1)
    assert len(fakes.shelf.records) == 20


def test_what_waits_long_in_the_worker_s_hands_counts_as_late(
    make_app: MakeApp, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Load] = []

    def look(load: Load, bounds: Bounds, memory: Memory, now: float) -> Memory:
        seen.append(load)
        return memory

    monkeypatch.setattr(autoscale, "EVERY", 0.02)
    monkeypatch.setattr(autoscale, "decide", look)
    fakes.reserve = 3
    app = make_app({"worker.pool": "manual", "worker.concurrency": 1, "worker.autoscale_max": 5})
    job = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes):
        job.map_delay([()] * 10)
        eventually(lambda: seen and seen[-1].waited > 0.1)
    assert seen[-1].running == 1
    assert seen[-1].waiting + seen[-1].backlog > 0


def test_a_broker_that_cannot_be_asked_changes_nothing(
    make_app: MakeApp, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscale, "EVERY", 0.01)
    app = make_app({"worker.pool": "manual", "worker.concurrency": 1, "worker.autoscale_max": 5})
    job = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        job.delay()
        eventually(lambda: fakes.pool.busy)
        fakes.broker.down = True
        assert never(lambda: run.worker.concurrency != 1, 0.1)
        fakes.broker.down = False


def test_without_bounds_nothing_looks(make_app: MakeApp, fakes: Fakes) -> None:
    with running(make_app(), fakes) as run:
        assert run.worker.autoscale._looking is None
        assert "autoscaler" not in run.worker.operations.stats()


def test_a_pool_of_one_size_is_refused_with_a_sentence(make_app: MakeApp) -> None:
    app = make_app({"worker.autoscale_max": 5, "worker.concurrency": None})
    with pytest.raises(
        NotSupported, match=r"\[worker\] autoscale_max needs a pool whose size can change, and 'inline'"
    ):
        app.worker()


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({"autoscale_min": 2}, "autoscale_min says nothing without autoscale_max"),
        ({"autoscale_min": 5, "autoscale_max": 2}, r"autoscale_min \(5\) is more than autoscale_max \(2\)"),
        (
            {"autoscale_max": 4, "concurrency": 8},
            r"concurrency \(8\), with which the worker starts, is not from 1 to 4",
        ),
        ({"autoscale_max": 0}, "autoscale_max must be at least 1"),
    ],
)
def test_bounds_that_leave_no_room_are_refused(make_app: MakeApp, chosen: dict[str, int], why: str) -> None:
    settings = {"worker.concurrency": None, **{f"worker.{name}": value for name, value in chosen.items()}}
    with pytest.raises(SettingsError, match=why):
        _ = make_app(settings).settings


def test_bounds_are_given_and_changed_while_a_worker_runs(
    make_app: MakeApp, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscale, "EVERY", 0.01)
    app = make_app({"worker.pool": "manual", "worker.concurrency": 3})
    with running(app, fakes) as run:
        worker = run.worker

        def change(least: int | None = None, most: int | None = None) -> Any:
            async def call() -> Any:
                return worker.operations.autoscale(least, most)

            return worker.app.runtime.call(call())

        assert change(most=8) == {"min": 1, "max": 8, "current": 3}
        assert change(least=5) == {"min": 5, "max": 8, "current": 3}
        eventually(lambda: worker.concurrency == 5)
        assert change(2, 2)["max"] == 2
        eventually(lambda: worker.concurrency == 2)
        for least, most in ((0, None), (3, None), (None, 1)):
            with pytest.raises(ValueError, match="between"):
                change(least, most)
        assert worker.operations.stats()["autoscaler"] == {"min": 2, "max": 2, "current": 2}


def test_bounds_for_a_pool_of_one_size_are_refused_while_it_runs(make_app: MakeApp, fakes: Fakes) -> None:
    with running(make_app(), fakes) as run, pytest.raises(NotSupported, match="cannot change its size"):
        run.worker.operations.autoscale(1, 2)
