"""The scheduler store's tables, and the verbs that work on them. Everything here runs on the database's thread."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

from umbel.model import Lease, ScheduleEntry
from umbel.ports.clock import Clock
from umbel.ports.scheduler import entry_of, runs_of
from umbel_sqlite.connection import Schema

SCHEMA: Final = Schema(
    part="schedules",
    version=1,
    script=(
        # An entry that is changed gets a new row: its number, which is never used twice, is the revision.
        """CREATE TABLE umbel_schedules (
            revision INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL UNIQUE,
            enabled INTEGER NOT NULL,
            declared INTEGER NOT NULL,
            definition TEXT NOT NULL,
            runs TEXT NOT NULL,
            next_due REAL
        )""",
        "CREATE INDEX umbel_schedules_due ON umbel_schedules (next_due) WHERE enabled AND next_due IS NOT NULL",
        "CREATE INDEX umbel_schedules_declared ON umbel_schedules (declared) WHERE declared",
        """CREATE TABLE umbel_scheduler (
            one INTEGER PRIMARY KEY CHECK (one = 1),
            owner TEXT NOT NULL,
            fence INTEGER NOT NULL,
            until REAL NOT NULL
        )""",
        "INSERT INTO umbel_scheduler VALUES (1, '', 0, 0)",
    ),
)

_ENTRY: Final = "SELECT name, definition, runs, next_due, revision FROM umbel_schedules"

Row = tuple[str, bool, bool, str, str, float | None]
"""Name, enabled, declared, definition, runs, next due: what one entry is written as."""


class Entries:
    """The verbs: each takes all the payloads that wait for it, and returns one answer for each."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def load(
        self, db: sqlite3.Connection, payloads: Sequence[tuple[Sequence[str] | None, bool]]
    ) -> Sequence[list[ScheduleEntry]]:
        answers = []
        for names, declared in payloads:
            sql, parameters = f"{_ENTRY} WHERE declared" if declared else f"{_ENTRY} WHERE TRUE", []
            if names is not None:
                sql, parameters = f"{sql} AND name IN (SELECT value FROM json_each(?))", [json.dumps(list(names))]
            answers.append([_entry(row) for row in db.execute(sql, parameters).fetchall()])
        return answers

    def upsert(self, db: sqlite3.Connection, payloads: Sequence[Sequence[Row]]) -> Sequence[None]:
        for name, enabled, declared, definition, runs, next_due in chain.from_iterable(payloads):
            known = db.execute("DELETE FROM umbel_schedules WHERE name = ? RETURNING runs", (name,)).fetchone()
            db.execute(
                "INSERT INTO umbel_schedules (name, enabled, declared, definition, runs, next_due)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (name, enabled, declared, definition, known[0] if known else runs, next_due),
            )
        return [None] * len(payloads)

    def remove(self, db: sqlite3.Connection, payloads: Sequence[Sequence[str]]) -> Sequence[int]:
        sql = "DELETE FROM umbel_schedules WHERE name IN (SELECT value FROM json_each(?))"
        return [db.execute(sql, (json.dumps(list(names)),)).rowcount for names in payloads]

    def due(self, db: sqlite3.Connection, payloads: Sequence[tuple[float, int]]) -> Sequence[list[ScheduleEntry]]:
        sql = f"{_ENTRY} WHERE enabled AND next_due IS NOT NULL AND next_due <= ? ORDER BY next_due LIMIT ?"
        return [[_entry(row) for row in db.execute(sql, payload).fetchall()] for payload in payloads]

    def mark(self, db: sqlite3.Connection, payloads: Sequence[tuple[Sequence[ScheduleEntry], int]]) -> Sequence[bool]:
        now = self._clock.time()
        answers = []
        for entries, fence in payloads:
            leads = "SELECT 1 FROM umbel_scheduler WHERE fence = ? AND until > ?"
            answers.append(db.execute(leads, (fence, now)).fetchone() is not None)
            if answers[-1]:
                db.executemany(
                    "UPDATE umbel_schedules SET runs = ?, next_due = iif(revision = ?, ?, next_due) WHERE name = ?",
                    [(runs_of(entry), entry.revision, entry.next_due, entry.name) for entry in entries],
                )
        return answers

    def lead(self, db: sqlite3.Connection, payloads: Sequence[tuple[str, float]]) -> Sequence[Lease]:
        now = self._clock.time()
        for owner, lease in payloads:
            db.execute(
                "UPDATE umbel_scheduler SET fence = fence + (until <= :now), owner = :owner, until = :until"
                " WHERE until <= :now OR owner = :owner",
                {"now": now, "owner": owner, "until": now + lease},
            )
        leader = _leader(db)
        return [leader] * len(payloads)

    def leader(self, db: sqlite3.Connection, payloads: Sequence[None]) -> Sequence[Lease | None]:
        leader = _leader(db)
        return [leader if leader.until > self._clock.time() else None] * len(payloads)

    def resign(self, db: sqlite3.Connection, payloads: Sequence[str]) -> Sequence[None]:
        for owner in payloads:
            db.execute("UPDATE umbel_scheduler SET until = 0 WHERE owner = ?", (owner,))
        return [None] * len(payloads)


def _leader(db: sqlite3.Connection) -> Lease:
    owner, fence, until = db.execute("SELECT owner, fence, until FROM umbel_scheduler").fetchone()
    return Lease(name="leader", owner=owner, fence=fence, until=until)


def _entry(row: tuple[Any, ...]) -> ScheduleEntry:
    return entry_of(*row)
