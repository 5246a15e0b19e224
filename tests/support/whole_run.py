"""What a run of the whole suite needs, beside its tests: an order, news of what fails, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

LONG: Final = (
    "core/tests/testing/test_zoo.py",
    "tests/packaging/test_kernel_alone.py",
    "tests/interop/",
    "tests/faults/test_faults_waiting.py",
    "plugins/amqp/tests/test_amqp_contract.py",
    "tests/docs/test_examples.py",
    "tests/faults/",
    "plugins/amqp/",
    "plugins/redis/tests/test_redis_transport_contract.py",
    "tests/template/",
    "tests/packaging/",
    "tests/reliability/",
    "tests/",
    "contrib/celery/",
    "plugins/",
)
"""Files and folders whose tests take longest, the longest first; all others follow. What takes long begins early, or one
process is still at it when the others have ended.
"""
PATIENCE: Final = 60.0
"""Seconds after which a test that still runs is named, and again after twice, four times … as long."""
MARK: Final = "TESTS_OF"
"""In the environment of every process of one run."""
HEIR: Final = Path(__file__).with_name("heir.py")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or MARK in os.environ:
        return  # a part of a run: a process of pytest-xdist, or what a test starts
    bury(config)
    if config.getoption("numprocesses", None):
        config.pluginmanager.register(News(config), "whole-run-news")


def bury(config: pytest.Config) -> None:
    """Have every process that this run leaves behind killed when it is gone, however it has ended."""
    os.environ[MARK] = mark = secrets.token_hex(8)
    command = [sys.executable, "-S", str(HEIR), str(os.getpid()), f"{MARK}={mark}"]
    # Without the mark, and in a session of its own: it is to live when all others are gone.
    clean = {name: value for name, value in os.environ.items() if name != MARK}
    silent = subprocess.DEVNULL
    heir = subprocess.Popen(command, env=clean, stdin=silent, stdout=silent, stderr=silent, start_new_session=True)

    def forget() -> None:
        os.environ.pop(MARK, None)
        heir.returncode = 0  # it outlives us, and that is no reason for a ResourceWarning

    config.add_cleanup(forget)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one process alone keeps to the order of the folders, quick ones first
        items.sort(key=lambda item: rank(item.nodeid))


def rank(nodeid: str) -> int:
    return next((number for number, prefix in enumerate(LONG) if nodeid.startswith(prefix)), len(LONG))


class News:
    """Tells what has failed when it fails, and what is running when that takes long or somebody ends the run.

    Only of runs in several processes: one process alone names its tests anyway.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._since: dict[str, float] = {}
        self._failed: list[str] = []
        self._over = threading.Event()

    def pytest_sessionstart(self) -> None:
        signal.signal(signal.SIGTERM, self._terminated)
        threading.Thread(target=self._watch, name="whole-run-news", daemon=True).start()

    def pytest_sessionfinish(self) -> None:
        self._over.set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._since[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._since.pop(nodeid, None)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._since.pop(report.nodeid, None)  # a process that has crashed tells of no end
            self._failed.append(f"{report.when} of {report.nodeid}: {_first_line(report)}")
            writer = self._config.get_terminal_writer()
            writer.line()
            writer.sep("!", f"{report.when} of {report.nodeid}", red=True)
            report.toterminal(writer)
            writer.flush()

    def pytest_unconfigure(self) -> None:
        """A line for each failure, below all that was said of them: who sees only the end sees every name."""
        print(*self._failed, sep="\n", flush=True)

    def running(self) -> Iterator[tuple[float, str]]:
        """For how many seconds each test has been running, the longest first."""
        now = time.monotonic()
        yield from sorted(((now - since, nodeid) for nodeid, since in self._since.copy().items()), reverse=True)

    def _watch(self) -> None:
        named: dict[str, float] = {}
        while not self._over.wait(5):
            for seconds, nodeid in self.running():
                if seconds > named.get(nodeid, PATIENCE):
                    named[nodeid] = 2 * seconds
                    say(f"running for {seconds:.0f} s: {nodeid}")

    def _terminated(self, number: int, frame: FrameType | None) -> Any:
        say(*(f"running for {seconds:.0f} s when the run was ended: {nodeid}" for seconds, nodeid in self.running()))
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _first_line(report: pytest.TestReport, longest: int = 150) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longreprtext).partition("\n")[0][:longest]


def say(*lines: str) -> None:
    """To the real stderr, whatever is captured and whoever writes to it meanwhile."""
    os.write(2, "".join(f"\n{line}" for line in (*lines, "")).encode())
