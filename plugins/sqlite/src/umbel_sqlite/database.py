"""One SQLite file, worked by one thread, so that the event loop never blocks on it.

Calls that wait together share one transaction (group commit). A call is a *verb* and a payload; a verb is handed all the
payloads that wait for it at once and returns one answer for each. If the shared transaction fails, each call is tried in
one of its own, so that no call fails for another's fault.

Writers, and with them the checkpoints that SQLite runs inside a commit, also exclude each other by a lock on
``<file>-lock``: no process ever resets the write-ahead log while another checkpoints it, a race that damages files in
SQLite before 3.51.3.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

from attrs import define, frozen

from umbel.errors import UmbelError
from umbel_sqlite.bells import Ringer
from umbel_sqlite.faults import PASSING, Fault, code_of, explain, poisons
from umbel_sqlite.options import Options

Verb = Callable[[sqlite3.Connection, Sequence[Any]], Sequence[Any]]

_LARGEST_GROUP: Final = 1000
_CHECKPOINT_PAGES: Final = 4000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02


@frozen(kw_only=True)
class Schema:
    """The tables of one driver. Two drivers may share a file: each has its own part and version."""

    part: str
    version: int
    script: tuple[str, ...]


@define(eq=False)
class _Call:
    verb: Verb
    payload: Any
    write: bool
    ring: str
    deadline: float
    refused: type[UmbelError]
    answered: asyncio.Future[Any]


class Database:
    """Runs verbs. Bound to the event loop of the first call, opened by it, and mended inside after a fault."""

    def __init__(self, file: str, options: Options, schema: Schema, unavailable: type[UmbelError]) -> None:
        self.file = file
        self._options = options
        self._schema = schema
        self._unavailable = unavailable
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._inbox: queue.SimpleQueue[list[_Call] | None] = queue.SimpleQueue()
        self._outgoing: list[_Call] = []
        self._timed: set[_Call] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._closed = False
        self._ended = asyncio.Event()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._lock_file: int | None = None
        self._ringer = Ringer(file)
        self._gate = threading.Lock()
        """Held while the connection is in use, and across a fork."""
        with _forking:
            _databases.add(self)

    # --- on the event loop -----------------------------------------------------------------------

    def submit(
        self,
        verb: Verb,
        payload: Any = None,
        *,
        write: bool = False,
        ring: str = "",
        timeout: float | None = None,
        refused: type[UmbelError] | None = None,
    ) -> asyncio.Future[Any]:
        """Have ``verb`` run; the future holds its answer, or the driver's error.

        ``ring``: whom to wake after the commit. ``timeout`` bounds the whole call; without it, only the wait for locks is
        bounded. ``refused``: the error for a permanent fault.
        """
        if self._closed:
            raise self._unavailable(f"this connection to {self.file} is closed")
        if self._pid != os.getpid():
            raise self._unavailable(f"this connection to {self.file} was made before a fork: make another in the child")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name=f"sqlite-{self._schema.part}", daemon=True)
            self._thread.start()
        answered: asyncio.Future[Any] = self._loop.create_future()
        deadline = time.monotonic() + (self._options.busy_timeout if timeout is None else timeout)
        call = _Call(verb, payload, write, ring, deadline, refused or self._unavailable, answered)
        if timeout is not None:
            self._timed.add(call)
            if self._alarm is None or self._alarm.when() > self._loop.time() + timeout:
                self._set_alarm(timeout)
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(call)
        return answered

    async def close(self) -> None:
        """Finish what was submitted, but wait for no more locks; then end the thread. Harmless when called twice."""
        if self._closed:
            return
        self._closed = True
        with _forking:
            _databases.discard(self)
        if self._thread is not None:
            self._flush()
            self._inbox.put(None)
            await self._ended.wait()
            self._thread.join()
        if self._alarm is not None:
            self._alarm.cancel()

    def _flush(self) -> None:
        calls, self._outgoing = self._outgoing, []
        if calls:
            self._inbox.put(calls)

    def _answer(self, answers: Sequence[tuple[_Call, Any, Exception | None]]) -> None:
        for call, value, error in answers:
            self._timed.discard(call)
            if call.answered.done():
                continue
            if error is None:
                call.answered.set_result(value)
            else:
                call.answered.set_exception(error)

    def _set_alarm(self, delay: float) -> None:
        assert self._loop is not None
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self._loop.call_later(delay, self._expire)

    def _expire(self) -> None:
        self._alarm = None
        now = time.monotonic()
        late = self._unavailable(f"{self.file} did not answer within the deadline: the disk is too slow, or stuck")
        self._answer([(call, None, late) for call in list(self._timed) if call.deadline <= now])
        if self._timed:
            self._set_alarm(max(0.001, min(call.deadline for call in self._timed) - now))

    # --- on the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while (calls := self._inbox.get()) is not None:
            try:
                while more := self._inbox.get_nowait():
                    calls += more
                self._inbox.put(None)  # the end: seen again after this round
            except queue.Empty:
                pass
            for start in range(0, len(calls), _LARGEST_GROUP):
                group = calls[start : start + _LARGEST_GROUP]
                self._transact([call for call in group if not call.write], write=False)
                self._transact([call for call in group if call.write], write=True)
        with self._gate:
            self._disconnect()
            self._ringer.close()
        self._tell(self._ended.set)

    def _transact(self, calls: list[_Call], *, write: bool) -> None:
        pause = 0.0
        while calls := self._alive(calls, pause):
            try:
                with self._gate:
                    answers = self._attempt(calls, write)
            except Exception as error:
                if isinstance(error, BlockingIOError) or code_of(error) in PASSING:
                    time.sleep(pause * random.uniform(0.5, 1))
                    pause = min(max(pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
                    continue
                if len(calls) == 1 or self._connection is None:  # one is at fault, or none of them
                    self._fail(calls, error)
                    return
                for call in calls:
                    self._transact([call], write=write)
                return
            self._report([(call, answer, None) for call, answer in answers])
            if kinds := {call.ring for call in calls if call.ring}:
                self._ringer.ring(kinds)
            return

    def _alive(self, calls: list[_Call], pause: float) -> list[_Call]:
        """The calls that are still worth a try after a ``pause``; the others have failed."""
        horizon = time.monotonic() + pause
        alive: list[_Call] = []
        late: list[tuple[_Call, Any, Exception]] = []
        for call in calls:
            if call.answered.cancelled():
                continue
            if call.deadline > horizon and not (self._closed and pause):
                alive.append(call)
            elif pause:
                sentence = f"{self.file} is locked by another process: see `fuser {self.file}`, or raise busy_timeout"
                late.append((call, None, self._unavailable(sentence)))
            else:
                late.append((call, None, self._unavailable(f"{self.file} is overloaded: the call waited too long")))
        if late:
            self._report(late)
        return alive

    def _fail(self, calls: list[_Call], error: Exception) -> None:
        fault = error if isinstance(error, Fault) else explain(error, self.file)
        answers: list[tuple[_Call, Any, Exception]] = []
        for call in calls:
            if fault is None:
                answers.append((call, None, error))
            else:
                kind = call.refused if fault.permanent else self._unavailable
                answers.append((call, None, kind(str(fault))))
        self._report(answers)

    def _report(self, answers: Sequence[tuple[_Call, Any, Exception | None]]) -> None:
        self._tell(self._answer, answers)

    def _tell(self, callback: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():
                raise  # a closed loop has nobody left to tell

    def _attempt(self, calls: list[_Call], write: bool) -> list[tuple[_Call, Any]]:
        """One transaction for all ``calls``. Raises ``BlockingIOError`` where another process is writing."""
        groups: dict[Verb, list[_Call]] = {}
        for call in calls:
            groups.setdefault(call.verb, []).append(call)
        connection = self._connect()
        if write:
            self._lock()
        try:
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            answers: list[tuple[_Call, Any]] = []
            for verb, group in groups.items():
                answers += zip(group, verb(connection, [call.payload for call in group]), strict=True)
            connection.execute("COMMIT")
            return answers
        except BaseException as error:
            if poisons(error):
                self._disconnect()
            elif connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        finally:
            if write:
                self._unlock()

    # --- the connection, behind the gate ---------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._identity == _identity(self.file):
            return self._connection
        self._disconnect()  # never opened, closed for a fork, or the file was replaced under us
        try:
            self._lock_file = os.open(self.file + "-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._lock()
            try:
                self._connection = self._open()
                self._identity = _identity(self.file)
            finally:
                self._unlock()
        except (sqlite3.Error, OSError) as error:
            self._disconnect()
            if isinstance(error, BlockingIOError) or code_of(error) in PASSING:
                raise
            raise explain(error, self.file) or error from error
        return self._connection

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.file, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA page_size=8192")  # of a new file; an old one keeps its own
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":
                raise Fault(f"the file system of {self.file} has no shared memory: use a local disk", permanent=True)
            connection.execute(f"PRAGMA synchronous={self._options.synchronous}")
            connection.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
            connection.execute("PRAGMA journal_size_limit=67108864")
            connection.execute("PRAGMA cache_size=-16384")
            connection.execute("PRAGMA secure_delete=OFF")
            connection.execute("PRAGMA temp_store=MEMORY")
            if self._options.max_file_size is not None:
                page_size = connection.execute("PRAGMA page_size").fetchone()[0]
                connection.execute(f"PRAGMA max_page_count={max(1, self._options.max_file_size // page_size)}")
            self._migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        part, version = self._schema.part, self._schema.version
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE IF NOT EXISTS umbel_schema (part TEXT PRIMARY KEY, version INTEGER NOT NULL)")
        row = connection.execute("SELECT version FROM umbel_schema WHERE part = ?", (part,)).fetchone()
        if row is None:
            for statement in self._schema.script:
                connection.execute(statement)
            connection.execute("INSERT INTO umbel_schema VALUES (?, ?)", (part, version))
        elif row[0] != version:
            raise Fault(
                f"{self.file} holds version {row[0]} of Umbel's {part} tables and this umbel-sqlite knows {version}:"
                " `pip install -U umbel-sqlite`, or name another file",
                permanent=True,
            )
        connection.execute("COMMIT")

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
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
        """Let the transaction that runs end, and close the connection; the next call opens it again."""
        self._gate.acquire()
        self._disconnect()

    def after_fork_in_parent(self) -> None:
        self._gate.release()

    def after_fork_in_child(self) -> None:
        self._gate = threading.Lock()
        self._thread = None


def _identity(file: str) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


# SQLite remembers in each process which locks it holds, and a child made by fork() inherits that memory without the
# locks: a connection that the child then opens to the same file believes itself protected, and is not. So no connection
# is open at the moment of a fork.

_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_forking = threading.Lock()
_paused: list[Database] = []


def _before_fork() -> None:
    _forking.acquire()
    _paused[:] = _databases
    for database in _paused:
        database.before_fork()


def _after_fork_in_parent() -> None:
    for database in _paused:
        database.after_fork_in_parent()
    _paused.clear()
    _forking.release()


def _after_fork_in_child() -> None:
    global _forking
    for database in _paused:
        database.after_fork_in_child()
    _paused.clear()
    _databases.clear()
    _forking = threading.Lock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
