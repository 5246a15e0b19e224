"""What became of the jobs of a child that is dead, as its shared memory tells it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from umbel.model import Ending, Job
from umbel_children.cells import BEAT, CURRENT, ROWS, STEP, THREADS, Cell, shared_cell
from umbel_children.records import Many

LIMIT = (Ending.TIMED_OUT, "hard time limit of 1 s")


class NoServer:
    """What a record needs of its fork server here: nothing."""


@pytest.fixture
def cell() -> Iterator[Cell]:
    with shared_cell(8) as (_, cell):
        yield cell
    cell.close()


def child(cell: Cell, *, claimed: int, running: dict[int, int], out: int = 5) -> Many:
    """Five jobs were handed over; ``running``: job by row."""
    record = Many(number=1, server=NoServer(), cell=cell, slots=4)  # type: ignore[arg-type]  # it is not asked for anything
    record.out = {number: Job(id=10 * number, task="shop.work", payload=()) for number in range(1, out + 1)}
    record.handed = out
    cell.words[CURRENT] = claimed
    cell.words[ROWS] = 4
    for row, job in running.items():
        cell.jobs[2 * row] = job
        cell.begun[2 * row + 1] = time.monotonic() - 1
    return record


def ends(record: Many, how: str) -> dict[int, Ending]:
    return {job.id: ending for job, ending, _, _ in record.fates(how)}


def test_what_was_not_claimed_is_returned_and_what_was_claimed_is_lost(cell: Cell) -> None:
    record = child(cell, claimed=3, running={0: 1, 1: 2, 2: 3})
    fates = record.fates("signal 9 (SIGKILL)")
    assert [(job.id, ending) for job, ending, _, _ in fates] == [
        (10, Ending.LOST),
        (20, Ending.LOST),
        (30, Ending.LOST),
        (40, Ending.RETURNED),
        (50, Ending.RETURNED),
    ]
    assert all(1 <= runtime < 60 for _, ending, _, runtime in fates if ending is Ending.LOST)
    assert record.out == {}


def test_what_the_pool_has_killed_is_blamed_alone(cell: Cell) -> None:
    record = child(cell, claimed=2, running={0: 1, 1: 2}, out=3)
    record.verdict, record.blamed = LIMIT, 2
    assert ends(record, "signal 9 (SIGKILL)") == {10: Ending.COLLATERAL, 20: Ending.TIMED_OUT, 30: Ending.RETURNED}


def test_a_pool_that_stops_blames_nobody_in_particular(cell: Cell) -> None:
    record = child(cell, claimed=2, running={0: 1, 1: 2}, out=2)
    record.verdict = Ending.CANCELLED, "the worker stopped"
    assert ends(record, "signal 9 (SIGKILL)") == {10: Ending.CANCELLED, 20: Ending.CANCELLED}


@pytest.mark.parametrize(
    ("step", "threads", "how", "blamed"),
    [
        (2, 0, "exit code 1", {20}),
        (2, 0, "signal 11 (SIGSEGV)", {20}),
        (2, 0, "signal 9 (SIGKILL)", {10, 20}),
        (2, 1, "signal 11 (SIGSEGV)", {10, 20}),
        (0, 0, "signal 11 (SIGSEGV)", {10, 20}),
        (7, 0, "signal 11 (SIGSEGV)", {10, 20}),
    ],
)
def test_a_crash_is_blamed_on_whose_step_it_was_where_that_is_sure(
    cell: Cell, step: int, threads: int, how: str, blamed: set[int]
) -> None:
    record = child(cell, claimed=2, running={0: 1, 1: 2}, out=2)
    cell.words[STEP], cell.words[THREADS] = step, threads
    told = ends(record, how)
    assert {job for job, ending in told.items() if ending is Ending.LOST} == blamed
    assert {ending for job, ending in told.items() if job not in blamed} <= {Ending.COLLATERAL}


def test_a_child_is_stuck_that_does_not_look_at_what_it_was_given(cell: Cell) -> None:
    record, now = child(cell, claimed=0, running={}), time.monotonic()
    assert not record.stuck(now)
    record.handed_at = now
    assert not record.stuck(now + 0.01)
    assert record.stuck(now + 1)
    cell.times[BEAT] = now + 0.001
    assert not record.stuck(now + 1)
