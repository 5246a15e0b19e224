"""Locks of a whole fleet: ``with app.lock("report"):``, in tasks and outside, on threads and event loops.

A lock is a claim of the result store. Its holder renews it in the background; one that dies lets it end by its lease. A lease
can also end under a holder that lives (a machine that stood still, a store that was down): the holder is told as soon as that
can be known (``LockLost``), and what it writes can be refused by its fencing number, which grows with every new holder.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from attrs import define

from umbel.claiming import LOCK, aclaim, arelease, claim, release, renew
from umbel.errors import LockLost, LockTimeout, UmbelError
from umbel.model import Lease
from umbel.task import current_request

if TYPE_CHECKING:
    from umbel.app import Umbel

logger = logging.getLogger("umbel.locks")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.25
"""Seconds between two looks whether a lock is free."""
_ENDING: Final = (RuntimeError, CancelledError)
"""What a call may end with when its process, and the event loop with it, is ending."""
_IDLE: Final = 1.0
"""Seconds without a lock after which the thread that renews them ends."""


@define(eq=False)
class _Hold:
    """A lock in this process's hands."""

    name: str
    owner: str
    lease: float
    fence: int
    until: float
    """``time.monotonic()`` at which the lease ends, as seen from here: earlier than in the store."""
    pid: int
    renews: float
    """``time.monotonic()`` of the next renewal."""
    taken: bool = False
    """The store says that another has it, or that it had ended."""

    def answered(self, lease: Lease | None, asked: float) -> None:
        """What came of a renewal that began at ``asked``; None: the store has not answered."""
        if lease is None:
            self.renews = time.monotonic() + min(1.0, self.lease / 10)
        elif lease.owner != self.owner or lease.fence != self.fence:
            self.taken = True
        else:
            self.until, self.renews = asked + self.lease, asked + self.lease / 3

    @property
    def lost(self) -> bool:
        return self.taken or time.monotonic() >= self.until


class Lock:
    """One use of a lock, made by ``app.lock``: a context manager, also for ``async with``. Not reentrant.

    An object is for one holder at a time; any number of objects for one name, in any processes, exclude each other.
    """

    def __init__(self, app: Umbel, name: str, *, lease: float, timeout: float | None) -> None:
        if not name:
            raise ValueError("a lock has a name")
        if not lease > 0:
            raise ValueError(f"lease is a number of seconds greater than 0, not {lease!r}")
        self.name = name
        self.lease = lease
        self.timeout = timeout
        self._app = app
        self._hold: _Hold | None = None

    def __repr__(self) -> str:
        return f"<lock {self.name!r}{' held' if self.held else ''}>"

    # --- what it knows ---

    @property
    def held(self) -> bool:
        """Whether this object holds the lock, as far as can be known here. Does no I/O."""
        return self._own is not None and not self._own.lost

    @property
    def fence(self) -> int:
        """The fencing number: greater than that of every holder before. Raises ``LockLost`` where it is not held."""
        self.check()
        assert self._own is not None
        return self._own.fence

    def check(self) -> None:
        """Raise ``LockLost`` if the lock is not held, or not any more. Does no I/O."""
        if not self.held:
            raise LockLost(f"lock {self.name!r} is not held" + (" any more" if self._own is not None else ""))

    @property
    def _own(self) -> _Hold | None:
        return self._hold if self._hold is not None and self._hold.pid == os.getpid() else None

    # --- taking and giving up ---

    def acquire(self, *, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take the lock; False if it was not free, or not within ``timeout`` seconds (None: wait for ever). Blocks.

        Raises ``NotSupported`` where the result store keeps no claims, ``ResultStoreUnavailable``.
        """
        wait = _Wait(self, blocking, timeout)
        while True:
            asked = time.monotonic()
            lease = claim(self._app.gateway, LOCK + self.name, wait.owner, lease=self.lease, value=wait.value)
            if lease.owner == wait.owner:
                return self._taken(lease, asked)
            if (pause := wait.pause()) is None:
                return False
            time.sleep(pause)

    async def aacquire(self, *, blocking: bool = True, timeout: float | None = None) -> bool:
        """``acquire`` for event loops."""
        wait = _Wait(self, blocking, timeout)
        while True:
            asked = time.monotonic()
            lease = await aclaim(self._app.gateway, LOCK + self.name, wait.owner, lease=self.lease, value=wait.value)
            if lease.owner == wait.owner:
                return self._taken(lease, asked)
            if (pause := wait.pause()) is None:
                return False
            await asyncio.sleep(pause)

    def release(self) -> None:
        """Give the lock up. Raises ``LockLost`` if it was lost before; what was done under it may then have overlapped."""
        hold = self._given_up()
        if hold.lost or not self._released(hold):
            raise self._lost()

    async def arelease(self) -> None:
        """``release`` for event loops."""
        hold = self._given_up()
        if hold.lost or not await self._areleased(hold):
            raise self._lost()

    def _taken(self, lease: Lease, asked: float) -> bool:
        self._hold = _Hold(
            name=LOCK + self.name,
            owner=lease.owner,
            lease=self.lease,
            fence=lease.fence,
            until=asked + self.lease,
            pid=os.getpid(),
            renews=asked + self.lease / 3,
        )
        self._app.lock_keeper.add(self._hold)
        return True

    def _given_up(self) -> _Hold:
        if (hold := self._own) is None:
            raise LockLost(f"lock {self.name!r} is not held")
        self._hold = None
        self._app.lock_keeper.remove(hold)
        return hold

    def _released(self, hold: _Hold) -> bool:
        try:
            return release(self._app.gateway, hold.name, hold.owner)
        except UmbelError as exc:
            return self._ends_by_itself(exc)

    async def _areleased(self, hold: _Hold) -> bool:
        try:
            return await arelease(self._app.gateway, hold.name, hold.owner)
        except UmbelError as exc:
            return self._ends_by_itself(exc)

    def _ends_by_itself(self, exc: UmbelError) -> bool:
        logger.warning("lock %r could not be released and is free in %g s: %s", self.name, self.lease, exc)
        return True

    def _lost(self) -> LockLost:
        return LockLost(
            f"lock {self.name!r} was lost before it was released: its lease of {self.lease:g} s ended, and another may have had "
            "it meanwhile"
        )

    # --- as a context manager ---

    def __enter__(self) -> Lock:
        """Raises ``LockTimeout`` if it was not free within ``timeout``, and as ``acquire``."""
        if not self.acquire(timeout=self.timeout):
            raise self._not_free()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Raises ``LockLost``, unless something is raised already."""
        try:
            self.release()
        except LockLost as lost:
            if exc is None:
                raise
            logger.warning("%s", lost)

    async def __aenter__(self) -> Lock:
        if not await self.aacquire(timeout=self.timeout):
            raise self._not_free()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            await self.arelease()
        except LockLost as lost:
            if exc is None:
                raise
            logger.warning("%s", lost)

    def _not_free(self) -> LockTimeout:
        return LockTimeout(f"lock {self.name!r} was not free within {self.timeout or 0:g} s")


class _Wait:
    """One try to take a lock."""

    def __init__(self, lock: Lock, blocking: bool, timeout: float | None) -> None:
        if lock._own is not None and not lock._own.lost:
            raise RuntimeError(
                f"this object holds lock {lock.name!r} already; app.lock() gives another that waits for it"
            )
        self.owner = secrets.token_hex(12)
        request = current_request()
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "task": request.id if request else None}
        self.value = json.dumps(holder).encode()
        self._end = None if timeout is None else time.monotonic() + timeout
        self._blocking = blocking
        self._pause = _FIRST_PAUSE

    def pause(self) -> float | None:
        """Seconds until the next try; None: no more."""
        rest = None if self._end is None else self._end - time.monotonic()
        if not self._blocking or (rest is not None and rest <= 0):
            return None
        pause = self._pause * random.uniform(0.5, 1)  # not in step with others; not a secret
        self._pause = min(self._pause * 1.5, _LONGEST_PAUSE)
        return pause if rest is None else min(pause, rest)


class Keeper:
    """Renews the locks that this process holds, on a thread of its own that lives as long as there are any. Thread-safe.

    A lock object that is let go of without a release is not renewed any more, and ends by its lease.
    """

    def __init__(self, app: Umbel) -> None:
        self._app = app
        self._changed = threading.Condition()
        self._held: WeakSet[_Hold] = WeakSet()
        self._thread: threading.Thread | None = None

    def add(self, hold: _Hold) -> None:
        with self._changed:
            self._held.add(hold)
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="umbel-locks", daemon=True)
                self._thread.start()
            self._changed.notify()

    def remove(self, hold: _Hold) -> None:
        with self._changed:
            self._held.discard(hold)

    def close(self) -> None:
        """Renew nothing any more."""
        with self._changed:
            self._held.clear()
            self._changed.notify()

    def _keep(self) -> None:
        while self._renew_some():
            pass

    def _renew_some(self) -> bool:
        """False: there has been no lock for a while."""
        if (due := self._next()) is None:
            return False
        asked = time.monotonic()
        for hold, lease in zip(due, self._renewed(due), strict=True):
            hold.answered(lease, asked)
            if hold not in self._held:  # released meanwhile, and this may have taken it once more
                self._release(hold)
            elif hold.lost:
                self.remove(hold)
                if lease is not None and lease.owner == hold.owner:  # it was free, and this has taken it anew
                    self._release(hold)
                logger.warning("lock %r is lost: its lease of %g s has ended", hold.name, hold.lease)
        return True

    def _renewed(self, due: Sequence[_Hold]) -> Sequence[Lease | None]:
        try:
            return renew(self._app.gateway, [(hold.name, hold.owner, hold.lease) for hold in due])
        except UmbelError as exc:
            logger.warning("locks could not be renewed, trying again: %s", exc)
        except _ENDING as exc:
            logger.debug("locks are not renewed any more: %s", exc)
        return [None] * len(due)

    def _release(self, hold: _Hold) -> None:
        try:
            release(self._app.gateway, hold.name, hold.owner)
        except (UmbelError, *_ENDING) as exc:  # it ends by its lease
            logger.debug("lock %r is free in %g s: %s", hold.name, hold.lease, exc)

    def _next(self) -> list[_Hold] | None:
        """Wait for locks that are to be renewed; None: there has been none for a while."""
        with self._changed:
            while True:
                if not self._held and not self._changed.wait_for(lambda: self._held, _IDLE):
                    self._thread = None
                    return None
                now = time.monotonic()
                if due := [hold for hold in self._held if hold.renews <= now]:
                    return due
                self._changed.wait(min((hold.renews for hold in self._held), default=now) - now)
