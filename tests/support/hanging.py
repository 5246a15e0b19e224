"""A test that hangs costs its own result, never the run."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

GRACE = 60.0  # seconds past its own limit that a test has to take down what it began
_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_stderr] = os.dup(2)  # the real one: nothing is captured yet


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """pytest-timeout interrupts a test once. One whose `finally` then waits for ever ends its process here, with the stack
    of every thread; pytest-xdist tells which test it was, and goes on in a new process.
    """
    marker = item.get_closest_marker("timeout")
    limit = float(marker.args[0] if marker else item.config.getini("timeout"))
    faulthandler.dump_traceback_later(limit + GRACE, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


class EndsWithItsProcess(LoadFileScheduling):
    """As ``--dist loadfile``, but a test that ended its process is not run again: each new process would end likewise."""

    def remove_node(self, node: WorkerController) -> str | None:
        files = self.assigned_work[node]
        ended = next((test for tests in files.values() for test, done in tests.items() if not done), None)
        if ended is not None:
            next(tests for tests in files.values() if ended in tests)[ended] = True
        super().remove_node(node)
        return ended


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    return EndsWithItsProcess(config, log) if config.getvalue("dist") == "loadfile" else None
