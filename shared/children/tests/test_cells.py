from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from umbel_children.cells import CURRENT, DONE, RECALL, ROWS, Cell, fence, shared_cell

ROOM = 64


@pytest.fixture
def ends() -> Iterator[tuple[Cell, Cell]]:
    """The parent's and the child's."""
    with shared_cell(ROOM) as (fd, parent):
        child = Cell(fd, ROOM)
    yield parent, child
    child.close()
    parent.close()


def test_both_sides_see_the_same_and_memory_is_zero_at_first(ends: tuple[Cell, Cell]) -> None:
    parent, child = ends
    assert parent.rows() == {}
    assert parent.running == 0
    child.words[CURRENT] = 3
    assert parent.running == 3
    child.words[DONE] = 3
    assert parent.running == 0
    child.kept[:4] = b"kept"
    assert bytes(parent.kept[:4]) == b"kept"


def test_the_table_tells_what_runs_and_since_when(ends: tuple[Cell, Cell]) -> None:
    parent, child = ends
    for row, (job, since) in enumerate([(7, 1.5), (0, 9.0), (8, 2.5)]):
        child.begun[2 * row + 1] = since
        child.jobs[2 * row] = job
    child.words[ROWS] = 2
    assert parent.rows() == {7: 1.5}
    child.words[ROWS] = 3
    assert parent.rows() == {7: 1.5, 8: 2.5}
    child.jobs[0] = 0
    assert parent.rows() == {8: 2.5}


def test_a_row_is_never_read_with_the_start_of_another_job(ends: tuple[Cell, Cell]) -> None:
    parent, child = ends
    stop = threading.Event()

    def write() -> None:
        job = 0
        while not stop.is_set():
            job += 1
            child.begun[1] = float(job)
            child.jobs[0] = job
            child.jobs[0] = 0

    child.words[ROWS] = 1
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20_000):
            assert all(job == since for job, since in parent.rows().items())
    finally:
        stop.set()
        writer.join(30)


def test_of_a_job_that_is_taken_back_and_claimed_at_once_one_side_always_knows(ends: tuple[Cell, Cell]) -> None:
    """The handshake: never is a job taken back that the other side begins."""
    parent, child = ends
    rounds = 3000
    begun: set[int] = set()
    told: dict[int, int] = {}
    barrier = threading.Barrier(2)

    def claim() -> None:
        for job in range(1, rounds + 1):
            barrier.wait(30)
            child.words[CURRENT] = job
            fence()
            if child.words[RECALL] < job:
                begun.add(job)

    other = threading.Thread(target=claim)
    other.start()
    for job in range(1, rounds + 1):
        barrier.wait(30)
        told[job] = parent.recall(job)
    other.join(30)
    assert not [job for job in begun if told[job] < job]


def test_a_stack_goes_through_the_file(ends: tuple[Cell, Cell]) -> None:
    parent, child = ends
    for text in ("one stack", "another, with ü"):
        parent.ask_for_stack()
        assert parent.stack() == ""
        os.write(child.file, text.encode())
        assert parent.stack() == text
