"""One SQLite file, worked by one thread, so that the event loop never blocks on it.

Calls that wait together share one transaction (group commit). If that transaction fails, each is tried in one of its own,
so that no call fails for another's fault.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from attrs import define

from umbel.errors import UmbelError
from umbel_sqlite.connection import Connection, Schema, Verb, Work
from umbel_sqlite.faults import Fault, explain, passing
from umbel_sqlite.options import Options

_LARGEST_GROUP: Final = 1000
_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.02


@define(eq=False)
class _Call(Work):
    write: bool
    ring: str
    deadline: float
    refused: type[UmbelError]
    unfit: type[UmbelError] | None
    answered: asyncio.Future[Any]


class Database:
    """Runs verbs: on a thread of its own with ``submit``, on the calling thread with ``run``.

    ``submit`` binds it to one event loop. ``unavailable`` is the error of the driver whose database it is.
    """

    def __init__(self, file: str, options: Options, schema: Schema, unavailable: type[UmbelError]) -> None:
        self.file = file
        self._part = schema.part
        self._busy_timeout = options.busy_timeout
        self._unavailable = unavailable
        self._connection = Connection(file, options, schema)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._inbox: queue.SimpleQueue[list[_Call] | None] = queue.SimpleQueue()
        self._outgoing: list[_Call] = []
        self._timed: set[_Call] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._closed = False
        self._ended = asyncio.Event()

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
        unfit: type[UmbelError] | None = None,
    ) -> asyncio.Future[Any]:
        """Have ``verb`` run; the future holds its answer, or the driver's error.

        ``ring``: whom to wake after the commit. ``timeout`` bounds the whole call; without it, only the wait for locks is
        bounded. ``refused``: the error for a permanent fault; ``unfit``: for one of what is written, whatever the file.
        """
        self._check_usable()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._work, name=f"sqlite-{self._part}", daemon=True)
            self._thread.start()
        answered: asyncio.Future[Any] = self._loop.create_future()
        deadline = time.monotonic() + (self._busy_timeout if timeout is None else timeout)
        call = _Call(verb, payload, write, ring, deadline, refused or self._unavailable, unfit, answered)
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
        if self._connection.inherited:
            return
        if self._thread is not None:
            self._flush()
            self._inbox.put(None)
            await self._ended.wait()
            self._thread.join()
        with self._connection.gate:
            self._connection.close()
        if self._alarm is not None:
            self._alarm.cancel()

    def _check_usable(self) -> None:
        if self._closed:
            raise self._unavailable(f"this connection to {self.file} is closed")
        if self._connection.inherited:
            raise self._unavailable(f"this connection to {self.file} was made before a fork: make another in the child")

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
        self._answer([(call, None, self._stuck()) for call in list(self._timed) if call.deadline <= now])
        if self._timed:
            self._set_alarm(max(0.001, min(call.deadline for call in self._timed) - now))

    # --- on the thread ---------------------------------------------------------------------------

    def _work(self) -> None:
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
        self._tell(self._ended.set)

    def _transact(self, calls: list[_Call], *, write: bool) -> None:
        pause = 0.0
        while calls := self._alive(calls, pause):
            try:
                with self._connection.gate:
                    answers = self._connection.transact(calls, write=write)
            except Exception as error:
                if passing(error):
                    pause = _wait(pause)
                    continue
                if len(calls) == 1 or self._connection.sqlite is None:  # one is at fault, or none of them
                    self._report([(call, None, self._explained(error, call.refused, call.unfit)) for call in calls])
                    return
                for call in calls:
                    self._transact([call], write=write)
                return
            self._report([(call, answer, None) for call, answer in answers])
            if kinds := {call.ring for call in calls if call.ring}:
                with self._connection.gate:
                    self._connection.ring(kinds)
            return

    def _alive(self, calls: list[_Call], pause: float) -> list[_Call]:
        """The calls that are still worth a try after a ``pause``; the others have failed."""
        horizon = time.monotonic() + pause
        alive: list[_Call] = []
        late: list[tuple[_Call, Any, Exception]] = []
        for call in calls:
            if call.answered.done():  # cancelled, or too late
                continue
            if call.deadline > horizon and not (self._closed and pause):
                alive.append(call)
            else:
                late.append((call, None, self._locked() if pause else self._stuck()))
        if late:
            self._report(late)
        return alive

    def _report(self, answers: Sequence[tuple[_Call, Any, Exception | None]]) -> None:
        self._tell(self._answer, answers)

    def _tell(self, callback: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():
                raise  # a closed loop has nobody left to tell

    # --- on any thread ---------------------------------------------------------------------------

    def run(self, verb: Verb, payload: Any, *, ring: str, timeout: float, refused: type[UmbelError]) -> Any:
        """A writing ``verb`` on the calling thread, which blocks for ``timeout`` seconds at most. No event loop needed."""
        deadline = time.monotonic() + timeout
        work = Work(verb, payload)
        pause = 0.0
        while True:
            self._check_usable()
            if not self._connection.gate.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise self._stuck()
            try:
                self._check_usable()  # it may have been closed meanwhile
                [(_, answer)] = self._connection.transact([work], write=True)
                self._connection.ring({ring})
                return answer
            except Exception as error:
                if not passing(error):
                    raise self._explained(error, refused) from error
            finally:
                self._connection.gate.release()
            if time.monotonic() + pause >= deadline:
                raise self._locked()
            pause = _wait(pause)

    def _explained(
        self, error: Exception, refused: type[UmbelError], unfit: type[UmbelError] | None = None
    ) -> Exception:
        if isinstance(error, UmbelError):
            return error
        fault = error if isinstance(error, Fault) else explain(error, self.file)
        if fault is None:
            return error
        if fault.unfit and unfit is not None:
            return unfit(str(fault))
        return (refused if fault.permanent else self._unavailable)(str(fault))

    def _locked(self) -> UmbelError:
        return self._unavailable(
            f"{self.file} is locked by another process: see `fuser {self.file}`, or raise busy_timeout"
        )

    def _stuck(self) -> UmbelError:
        return self._unavailable(
            f"{self.file} did not answer within the deadline: its disk is too slow for this, or stuck"
        )


def _wait(pause: float) -> float:
    """Wait about so many seconds; return how many to wait the next time."""
    time.sleep(pause * random.uniform(0.5, 1))
    return min(max(pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
