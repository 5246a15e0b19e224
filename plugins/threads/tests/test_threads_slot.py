"""Interruptions hit the run that they are meant for, or nothing, wherever they land."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from functools import partial
from typing import Any

import pytest

from umbel.errors import SoftTimeLimitExceeded, TaskCancelled
from umbel.model import Ending, Job
from umbel_children.run import Window
from umbel_children.slot import Run, Slot

INTERRUPTIONS = (SoftTimeLimitExceeded, TaskCancelled)
_observe = object.__getattribute__


class Pierced(Run):
    """A run of which every access, also the slot's own bookkeeping, is a place for an interruption to land.

    The n-th access raises what ``plan[n]`` says, if the window is open then: an interruption that a thread aims at
    itself is delivered at once.
    """

    def pierce(self, slot: Slot, plan: dict[int, type[BaseException]]) -> None:
        self.__dict__.update(slot=slot, plan=plan, visits=0, aiming=False)

    def _visit(self) -> None:
        state = _observe(self, "__dict__")
        if not state or state["aiming"]:
            return
        state["visits"] += 1
        if (exception := state["plan"].get(state["visits"])) is not None:
            state["aiming"] = True
            try:
                if exception is TaskCancelled:
                    self.cancelled = True
                state["slot"].interrupt(self, exception)
            finally:
                state["aiming"] = False

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
        return ("counted", sum(n for n in range(payload[0])))


class Exits:
    def execute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        raise SystemExit(payload[0])


def pierced(executor: Any, plan: dict[int, type[BaseException]]) -> tuple[Pierced, int]:
    slot, run = Slot(), Pierced(Job(id=1, task="t", payload=(10,)))
    run.pierce(slot, plan)
    slot.work(run, executor)
    visits = run.__dict__["visits"]
    run.__dict__.clear()
    return run, visits


@pytest.mark.parametrize("executor", [Counts(), Exits()])
def test_work_survives_every_pair_of_places(executor: Any) -> None:
    _, quiet_visits = pierced(executor, {})
    assert quiet_visits > 8
    last = quiet_visits + 12
    places = range(1, last)
    endings = set()
    for (first, second), (one, other) in itertools.product(
        itertools.combinations(places, 2), itertools.permutations(INTERRUPTIONS)
    ):
        run, _ = pierced(executor, {first: one, second: other})
        assert sum(n for n in range(1000)) == 499_500
        completion = run.completion()
        assert run.window is Window.CLOSED
        assert completion.ending is not Ending.TIMED_OUT
        assert (completion.payload is not None) == (completion.ending is Ending.DONE)
        endings.add(completion.ending)
    expected = {Ending.CANCELLED, Ending.RETURNED, Ending.LOST}
    assert endings == (expected | {Ending.DONE} if isinstance(executor, Counts) else expected)


def test_a_payload_is_kept_when_the_interruption_comes_while_the_window_closes() -> None:
    _, quiet_visits = pierced(Counts(), {})
    done = 0
    for place in range(1, quiet_visits):
        run, _ = pierced(Counts(), {place: TaskCancelled})
        done += run.interrupted and run.completion().ending is Ending.DONE
    assert done > 0


def test_what_was_asked_for_and_not_delivered_is_withdrawn() -> None:
    """The interruption is asked for between the last check of the interpreter and the withdrawal.

    Only C code can be that late: a property whose getter is a C function.
    """
    ask = ctypes.PYFUNCTYPE(None, ctypes.c_ulong, ctypes.py_object)(("PyThreadState_SetAsyncExc", ctypes.pythonapi))
    ident = threading.get_ident()

    class Late(Slot):
        _as_parameter_ = 0
        _interrupting: Any = property(partial(ask, ident, TaskCancelled), lambda self, value: None)

    run = Run(Job(id=1, task="t", payload=(10,)), interrupted=True)
    Late().work(run, Counts())
    assert run.completion().payload == ("counted", 45)
    assert sum(n for n in range(1000)) == 499_500


def test_a_closing_window_waits_for_an_interruption_under_way() -> None:
    slot, run = Slot(), Run(Job(id=1, task="t", payload=(10,)))
    slot._interrupting = True
    thread = threading.Thread(target=slot.work, args=(run, Counts()), daemon=True)
    thread.start()
    while run.window is not Window.CLOSED:
        time.sleep(0.001)
    time.sleep(0.01)
    assert thread.is_alive()
    slot._interrupting = False
    thread.join(10)
    assert not thread.is_alive()


def test_a_run_cancelled_before_it_begins_is_returned() -> None:
    slot, run = Slot(), Run(Job(id=1, task="t", payload=(5,)), cancelled=True)
    assert slot.interrupt(run, TaskCancelled) is Window.AHEAD
    slot.work(run, Counts())
    assert run.completion().ending is Ending.RETURNED
    assert slot.interrupt(run, TaskCancelled) is Window.CLOSED
