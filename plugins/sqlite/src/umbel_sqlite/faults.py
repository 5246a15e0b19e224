"""What a failed SQLite call means: one sentence that names the file and the remedy."""

from __future__ import annotations

import os
import sqlite3
from typing import Final

_LOCKED: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_HARMLESS: Final = _LOCKED | {sqlite3.SQLITE_FULL, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT}


class Fault(Exception):
    """A failed call, explained. ``permanent``: the same call would fail again until somebody mends something.

    ``unfit``: it would fail in any file, because of what it was to write.
    """

    def __init__(self, sentence: str, *, permanent: bool, unfit: bool = False) -> None:
        super().__init__(sentence)
        self.permanent = permanent
        self.unfit = unfit


def passing(error: BaseException) -> bool:
    """Whether another holds a lock: the same call may succeed in a moment."""
    return isinstance(error, BlockingIOError) or _code_of(error) in _LOCKED


def _code_of(error: BaseException) -> int:
    """The primary result code of SQLite's; 0 for any other error."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def poisons(error: BaseException) -> bool:
    """Whether the connection should be thrown away after this."""
    return isinstance(error, sqlite3.DatabaseError) and _code_of(error) not in _HARMLESS


def explain(error: Exception, file: str) -> Fault | None:
    """The fault behind an error of SQLite's or the system's; None: not one of theirs, but a mistake in the program."""
    directory = os.path.dirname(file)
    match _code_of(error):
        case sqlite3.SQLITE_FULL:
            return Fault(f"no room for {file}: the disk, or the option max_file_size, is exhausted", permanent=False)
        case sqlite3.SQLITE_NOTADB:
            return Fault(f"{file} is not a SQLite database: name another file in the URL", permanent=True)
        case sqlite3.SQLITE_CORRUPT:
            return Fault(f"{file} is damaged ({error}): see `sqlite3 {file} .recover`", permanent=True)
        case sqlite3.SQLITE_TOOBIG:
            return Fault(f"too large for {file}: {error}", permanent=True, unfit=True)
    if isinstance(error, OverflowError | UnicodeError):
        return Fault(f"{file} cannot hold such a value: {error}", permanent=True, unfit=True)
    if isinstance(error, sqlite3.OperationalError | OSError):
        if not os.path.isdir(directory):
            return Fault(f"the directory of {file} does not exist: `mkdir -p {directory}`", permanent=False)
        if isinstance(error, PermissionError) or _code_of(error) == sqlite3.SQLITE_READONLY or not _writable(file):
            return Fault(f"{file} or its directory is not writable by user {os.geteuid()}", permanent=True)
        return Fault(f"{file} cannot be used: {error}", permanent=False)
    return Fault(f"{file} refused: {error}", permanent=True) if isinstance(error, sqlite3.Error) else None


def _writable(file: str) -> bool:
    existing = file if os.path.exists(file) else os.path.dirname(file)
    return os.access(existing, os.W_OK)
