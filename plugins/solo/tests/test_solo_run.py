"""Interruptions end the run that they are meant for, or nothing, wherever they land."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from umbel.errors import SoftTimeLimitExceeded, TaskCancelled
from umbel.model import Ending, Job
from umbel_children.run import Window
from umbel_solo.run import Run

INTERRUPTIONS = (SoftTimeLimitExceeded, TaskCancelled)
_observe = object.__getattribute__


class Pierced(Run):
    """A run of which every access is a place for the signal to arrive: the n-th one lands what ``plan[n]`` says."""

    def pierce(self, plan: dict[int, type[BaseException]]) -> None:
        self.__dict__.update(plan=plan, visits=0, landing=False)

    def _visit(self) -> None:
        state = _observe(self, "__dict__")
        if not state or state["landing"]:
            return
        state["visits"] += 1
        if (exception := state["plan"].get(state["visits"])) is not None:
            state["landing"] = True
            try:
                if exception is TaskCancelled:
                    self.cancelled = True
                self.aimed.append(exception)
                self.land(None)
            finally:
                state["landing"] = False

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name == "pierce":
            return _observe(self, name)
        _observe(self, "_visit")()
        return _observe(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._visit()
        super().__setattr__(name, value)
        self._visit()


class Counts:
    def execute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        return ("counted", sum(range(payload[0])))


class Exits:
    def execute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        raise SystemExit(payload[0])


def pierced(executor: Any, plan: dict[int, type[BaseException]]) -> tuple[Pierced, int]:
    run = Pierced(Job(id=1, task="t", payload=(10,)))
    run.pierce(plan)
    run.work(executor)
    visits = run.__dict__["visits"]
    run.__dict__.clear()
    return run, visits


@pytest.mark.parametrize("executor", [Counts(), Exits()])
def test_work_survives_every_pair_of_places(executor: Any) -> None:
    _, quiet_visits = pierced(executor, {})
    assert quiet_visits > 8
    endings = set()
    for places, exceptions in itertools.product(
        itertools.combinations(range(1, quiet_visits + 12), 2), itertools.permutations(INTERRUPTIONS)
    ):
        run, _ = pierced(executor, dict(zip(places, exceptions, strict=True)))
        completion = run.completion()
        assert run.window is Window.CLOSED
        assert (completion.payload is not None) == (completion.ending is Ending.DONE)
        endings.add(completion.ending)
    expected = {Ending.CANCELLED, Ending.RETURNED, Ending.LOST}
    assert endings == (expected | {Ending.DONE} if isinstance(executor, Counts) else expected)


def test_of_two_interruptions_at_once_the_cancel_wins_and_none_is_left() -> None:
    for order in itertools.permutations(INTERRUPTIONS):
        run = Run(Job(id=1, task="t", payload=()), window=Window.OPEN)
        run.aimed.extend(order)
        with pytest.raises(TaskCancelled):
            run.land(None)
        run.land(None)


def test_nothing_lands_outside_the_window() -> None:
    for window in (Window.AHEAD, Window.CLOSED):
        run = Run(Job(id=1, task="t", payload=()), window=window)
        run.aimed.append(TaskCancelled)
        run.land(None)
        assert not run.aimed


def test_a_run_cancelled_before_it_begins_is_returned() -> None:
    run = Run(Job(id=1, task="t", payload=(5,)), cancelled=True)
    run.work(Counts())
    assert run.completion().ending is Ending.RETURNED
