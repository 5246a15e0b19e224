"""One connection to the file: opened when needed, mended after a fault, closed across a fork.

Writers, and with them the checkpoints that SQLite runs inside a commit, exclude each other by a lock on ``<file>-lock``: no
process ever resets the write-ahead log while another checkpoints it, a race that damages files in SQLite before 3.51.3.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from attrs import define, frozen

from umbel_sqlite import forks
from umbel_sqlite.bells import Ringer
from umbel_sqlite.faults import Fault, explain, passing, poisons
from umbel_sqlite.options import Options

log = logging.getLogger("umbel.sqlite")

Verb = Callable[[sqlite3.Connection, Sequence[Any]], Sequence[Any]]
"""Takes all the payloads that wait for it, inside a transaction; returns one answer for each."""

_CHECKPOINT_PAGES: Final = 4000
_LARGEST_REST_OF_LOG: Final = 64 * 2**20


@frozen(kw_only=True)
class Schema:
    """The tables of one driver. Two drivers may share a file: each has its own part and version."""

    part: str
    version: int
    script: tuple[str, ...]


@define(eq=False)
class Work:
    """One verb with one payload."""

    verb: Verb
    payload: Any


W = TypeVar("W", bound=Work)


class _Sqlite(sqlite3.Connection):
    """Closes silently when it is collected: what was written is safe, and nobody has to close an app that is dropped.

    Python 3.13 warns of a connection that was not closed.
    """

    def __del__(self) -> None:
        try:
            self.close()
        except sqlite3.ProgrammingError:
            pass  # it could not be opened


class Connection:
    """For any thread that holds ``gate``."""

    def __init__(self, file: str, options: Options, schema: Schema) -> None:
        self.file = file
        self._options = options
        self._schema = schema
        self._pid = os.getpid()
        self.gate = threading.Lock()
        """Held while the connection is in use, and across a fork."""
        self.sqlite: sqlite3.Connection | None = None
        """None before the first transaction, and after a fault that concerns more than one call."""
        self._identity: tuple[int, int] | None = None
        self._lock_file: int | None = None
        self._ringer = Ringer(file)
        forks.register(self)

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the one that made the connection."""
        return self._pid != os.getpid()

    def transact(self, works: Sequence[W], *, write: bool) -> list[tuple[W, Any]]:
        """Do all ``works`` in one transaction, each verb once. Nothing is done if anything is raised.

        What ``faults.passing`` tells apart may be tried again in a moment.
        """
        groups: dict[Verb, list[W]] = {}
        for work in works:
            groups.setdefault(work.verb, []).append(work)
        db = self._ready()
        if write:
            self._lock()
        try:
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            answers: list[tuple[W, Any]] = []
            for verb, group in groups.items():
                answers += zip(group, verb(db, [work.payload for work in group]), strict=True)
            db.execute("COMMIT")
            return answers
        except BaseException as error:
            if poisons(error):
                self._disconnect()
            elif db.in_transaction:
                db.execute("ROLLBACK")
            raise
        finally:
            if write:
                self._unlock()

    def ring(self, kinds: set[str]) -> None:
        """Tell the listeners of all processes that there is something new."""
        try:
            self._ringer.ring(kinds)
        except OSError as error:  # what was written is safe, and whom it concerns polls
            log.warning("cannot wake the listeners of %s: %s", self.file, error)

    def close(self) -> None:
        """Free everything, for good. Not in a child that inherited the connection: there is nothing of it there."""
        forks.unregister(self)
        self._disconnect()
        self._ringer.close()

    def _ready(self) -> sqlite3.Connection:
        if self.sqlite is not None and self._identity == self._on_disk():
            return self.sqlite
        self._disconnect()  # never opened, closed for a fork, or the file was replaced under us
        try:
            self._lock_file = os.open(self.file + "-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._lock()
            try:
                self.sqlite = self._open()
                self._identity = self._on_disk()
            finally:
                self._unlock()
        except (sqlite3.Error, OSError) as error:
            self._disconnect()
            if passing(error):
                raise
            raise explain(error, self.file) or error from error
        return self.sqlite

    def _on_disk(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.file)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.file, timeout=0, isolation_level=None, check_same_thread=False, factory=_Sqlite)
        try:
            db.execute("PRAGMA page_size=8192")  # of a new file; an old one keeps its own
            if db.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
                raise Fault(f"the file system of {self.file} has no shared memory: use a local disk", permanent=True)
            db.execute(f"PRAGMA synchronous={self._options.synchronous}")
            db.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
            db.execute(f"PRAGMA journal_size_limit={_LARGEST_REST_OF_LOG}")
            db.execute("PRAGMA cache_size=-16384")
            db.execute("PRAGMA secure_delete=OFF")
            db.execute("PRAGMA temp_store=MEMORY")
            if self._options.max_file_size is not None:
                page_size = db.execute("PRAGMA page_size").fetchone()[0]
                db.execute(f"PRAGMA max_page_count={max(1, self._options.max_file_size // page_size)}")
            self._migrate(db)
        except BaseException:
            db.close()
            raise
        return db

    def _migrate(self, db: sqlite3.Connection) -> None:
        part, version = self._schema.part, self._schema.version
        db.execute("BEGIN IMMEDIATE")
        db.execute("CREATE TABLE IF NOT EXISTS umbel_schema (part TEXT PRIMARY KEY, version INTEGER NOT NULL)")
        row = db.execute("SELECT version FROM umbel_schema WHERE part = ?", (part,)).fetchone()
        if row is None:
            for statement in self._schema.script:
                db.execute(statement)
            db.execute("INSERT INTO umbel_schema VALUES (?, ?)", (part, version))
        elif row[0] != version:
            raise Fault(
                f"{self.file} holds version {row[0]} of Umbel's {part} tables and this umbel-sqlite knows {version}:"
                " `pip install -U umbel-sqlite`, or name another file",
                permanent=True,
            )
        db.execute("COMMIT")

    def _disconnect(self) -> None:
        db, self.sqlite = self.sqlite, None
        if db is not None:
            db.close()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _lock(self) -> None:
        assert self._lock_file is not None
        fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(self) -> None:
        if self._lock_file is not None:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    # --- forks -----------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Let the transaction that runs end, and disconnect; the next one connects again."""
        self.gate.acquire()
        self._disconnect()

    def after_fork_in_parent(self) -> None:
        self.gate.release()

    def after_fork_in_child(self) -> None:
        self.gate = threading.Lock()
