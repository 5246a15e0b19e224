"""The laws of the three ports, each test in a file of its own."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from umbel.testing.contracts import ResultStoreContract, SchedulerContract, TransportContract
from umbel_sqlite.result_store import SqliteResultStore
from umbel_sqlite.scheduler import SqliteScheduler
from umbel_sqlite.transport import SqliteTransport


class TestSqliteTransport(TransportContract):
    @pytest.fixture
    def make_transport(self, tmp_path: Path) -> Callable[[], SqliteTransport]:
        return lambda: SqliteTransport(f"sqlite:///{tmp_path}/queue.sqlite3")

    @pytest.fixture
    def unreachable(self, tmp_path: Path) -> Iterator[Callable[[], SqliteTransport]]:
        """A file that somebody else has locked."""
        file = tmp_path / "locked.sqlite3"
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            yield lambda: SqliteTransport(f"sqlite:///{file}")


class TestSqliteResultStore(ResultStoreContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> Callable[[], SqliteResultStore]:
        return lambda: SqliteResultStore(f"sqlite:///{tmp_path}/results.sqlite3")


class TestSqliteScheduler(SchedulerContract):
    @pytest.fixture
    def make_scheduler(self, tmp_path: Path) -> Callable[[], SqliteScheduler]:
        return lambda: SqliteScheduler(f"sqlite:///{tmp_path}/schedules.sqlite3")
