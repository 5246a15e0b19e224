"""No SQLite connection of ours is open at the moment of a fork.

SQLite remembers in each process which locks it holds, and a child made by ``fork()`` inherits that memory without the
locks: a connection that the child then opens to the same file believes itself protected, and is not. So every connection
lets its running transaction end before a fork, closes, and is opened again when next needed.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forkable(Protocol):
    def before_fork(self) -> None: ...
    def after_fork_in_parent(self) -> None: ...
    def after_fork_in_child(self) -> None: ...


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()
_paused: list[Forkable] = []
_lock = threading.Lock()
"""Held for a change of the set, and across a fork: two threads that fork at once pause the connections one after another."""


def register(connection: Forkable) -> None:
    with _lock:
        _registered.add(connection)


def unregister(connection: Forkable) -> None:
    with _lock:
        _registered.discard(connection)


def _before() -> None:
    _lock.acquire()
    _paused[:] = _registered
    for connection in _paused:
        connection.before_fork()


def _after_in_parent() -> None:
    for connection in _paused:
        connection.after_fork_in_parent()
    _paused.clear()
    _lock.release()


def _after_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    for connection in _paused:
        connection.after_fork_in_child()
    _paused.clear()
    _registered.clear()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
