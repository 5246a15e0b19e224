"""The result store's tables, and the verbs that work on them. Everything here runs on the database's thread.

Each stored state gets the next number of an ascending sequence that is never used twice, so that whoever waits reads only
what is new. Expired rows are invisible at once, and deleted in small portions by later writes.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Final

from attrs import frozen

from umbel.model import Lease, Result
from umbel.ports.clock import Clock
from umbel.ports.result_store import JoinState, surviving
from umbel_sqlite.connection import Schema

SCHEMA: Final = Schema(
    part="results",
    version=2,
    script=(
        """CREATE TABLE umbel_results (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            task_id TEXT NOT NULL UNIQUE,
            state TEXT NOT NULL,
            final INTEGER NOT NULL,
            lifetime REAL,
            expires REAL,
            content_type TEXT NOT NULL,
            content_encoding TEXT NOT NULL,
            document BLOB NOT NULL,
            place INTEGER NOT NULL
        )""",
        "CREATE INDEX umbel_results_state ON umbel_results (state)",
        "CREATE INDEX umbel_results_expires ON umbel_results (expires) WHERE expires IS NOT NULL",
        """CREATE TABLE umbel_joins (
            key TEXT PRIMARY KEY,
            count INTEGER NOT NULL DEFAULT 0,
            size INTEGER,
            fired INTEGER NOT NULL DEFAULT 0,
            owner TEXT,
            until REAL NOT NULL DEFAULT 0,
            marked REAL NOT NULL,
            lifetime REAL,
            expires REAL AS (marked + lifetime)
        ) WITHOUT ROWID""",
        "CREATE INDEX umbel_joins_unfired ON umbel_joins (until) WHERE fired = 0 AND count >= size",
        "CREATE INDEX umbel_joins_expires ON umbel_joins (expires) WHERE expires IS NOT NULL",
        """CREATE TABLE umbel_marks (
            key TEXT NOT NULL,
            member TEXT NOT NULL,
            value BLOB NOT NULL,
            PRIMARY KEY (key, member)
        ) WITHOUT ROWID""",
        """CREATE TABLE umbel_claims (
            fence INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL UNIQUE,
            owner TEXT NOT NULL,
            until REAL NOT NULL,
            value BLOB NOT NULL
        )""",
        "CREATE INDEX umbel_claims_until ON umbel_claims (until)",
    ),
)

_PUT: Final = "INSERT INTO umbel_results VALUES "
_ROW: Final = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_OVER: Final = """ ON CONFLICT (task_id) DO UPDATE SET seq = excluded.seq, state = excluded.state, final = excluded.final,
    lifetime = excluded.lifetime, expires = excluded.expires, content_type = excluded.content_type,
    content_encoding = excluded.content_encoding, document = excluded.document, place = excluded.place
    WHERE (NOT final AND (excluded.final OR excluded.place >= place)) OR expires <= ?"""
_CHUNKS: Final = (100, 10, 1)
_RESULT: Final = "SELECT task_id, state, document, content_type, content_encoding, lifetime FROM umbel_results"
_VISIBLE: Final = "(expires IS NULL OR expires > ?)"
_NEWS_AT_ONCE: Final = 2000
_SWEPT_AT_ONCE: Final = 200


@frozen(kw_only=True)
class Join:
    key: str
    marks: Mapping[str, bytes]
    size: int | None
    owner: str
    lease: float
    expires: float | None


@frozen(kw_only=True)
class Claim:
    name: str
    owner: str
    lease: float
    value: bytes | None


@frozen(kw_only=True)
class Look:
    """What a watcher asks: have these ended, and what has ended since?"""

    task_ids: Sequence[str]
    after: int | None
    """A number of the sequence; None: only say where it stands."""


@frozen(kw_only=True)
class Seen:
    results: Mapping[str, Result]
    """Final records of those asked for."""
    ended: Sequence[str]
    """Tasks whose final records are new since ``Look.after``."""
    last: int
    more: bool


class Records:
    """The verbs: each takes all the payloads that wait for it, and returns one answer for each."""

    sweep_interval = 3.0
    """Seconds between two sweeps, as long as one sweep leaves nothing over."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._swept = 0.0

    # --- results ---------------------------------------------------------------------------------

    def put(self, db: sqlite3.Connection, payloads: Sequence[Sequence[Result]]) -> Sequence[None]:
        now = self._clock.time()
        rows: list[tuple[Any, ...]] = []
        latest = chain.from_iterable(surviving(results) for results in payloads)
        for seq, r in enumerate(latest, self._last(db) + 1):
            expires = None if r.expires is None else now + r.expires
            about = (r.content_type, r.content_encoding, r.document)
            rows.append((seq, r.task_id, r.state, r.final, r.expires, expires, *about, r.order))
        start = 0
        for size in _CHUNKS:
            while len(rows) - start >= size:
                values = ",".join([_ROW] * size)
                parameters = list(chain.from_iterable(rows[start : start + size]))
                db.execute(_PUT + values + _OVER, [*parameters, now])
                start += size
        self._sweep(db, now)
        return [None] * len(payloads)

    def _last(self, db: sqlite3.Connection) -> int:
        row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'umbel_results'").fetchone()
        return int(row[0]) if row else 0

    def get(self, db: sqlite3.Connection, payloads: Sequence[Sequence[str]]) -> Sequence[dict[str, Result]]:
        now = self._clock.time()
        found = self._find(db, list(chain.from_iterable(payloads)), now)
        return [{task_id: found[task_id] for task_id in task_ids if task_id in found} for task_ids in payloads]

    def _find(self, db: sqlite3.Connection, task_ids: Sequence[str], now: float) -> dict[str, Result]:
        sql = f"{_RESULT} WHERE task_id IN (SELECT value FROM json_each(?)) AND {_VISIBLE}"
        return {row[0]: _result(row) for row in db.execute(sql, (json.dumps(task_ids), now)).fetchall()}

    def look(self, db: sqlite3.Connection, payloads: Sequence[Look]) -> Sequence[Seen]:
        return [self._look(db, look) for look in payloads]

    def _look(self, db: sqlite3.Connection, look: Look) -> Seen:
        found = self._find(db, look.task_ids, self._clock.time())
        last, news = self._last(db), []
        if look.after is not None:
            sql = "SELECT seq, task_id FROM umbel_results WHERE seq > ? AND final ORDER BY seq LIMIT ?"
            news = db.execute(sql, (look.after, _NEWS_AT_ONCE)).fetchall()
        more = len(news) == _NEWS_AT_ONCE
        return Seen(
            results={task_id: result for task_id, result in found.items() if result.final},
            ended=[task_id for _, task_id in news],
            last=news[-1][0] if more else last,
            more=more,
        )

    def forget(self, db: sqlite3.Connection, payloads: Sequence[Sequence[str]]) -> Sequence[None]:
        task_ids = json.dumps(list(chain.from_iterable(payloads)))
        db.execute("DELETE FROM umbel_results WHERE task_id IN (SELECT value FROM json_each(?))", (task_ids,))
        return [None] * len(payloads)

    def query(self, db: sqlite3.Connection, payloads: Sequence[tuple[str | None, int, int]]) -> Sequence[list[Result]]:
        now = self._clock.time()
        answers: list[list[Result]] = []
        for state, limit, offset in payloads:
            of_state, chosen = ("", ()) if state is None else (" AND state = ?", (state,))
            sql = f"{_RESULT} WHERE {_VISIBLE}{of_state} ORDER BY seq DESC LIMIT ? OFFSET ?"
            rows = db.execute(sql, (now, *chosen, limit, offset)).fetchall()
            answers.append([_result(row) for row in rows])
        return answers

    def _sweep(self, db: sqlite3.Connection, now: float) -> None:
        if time.monotonic() < self._swept + self.sweep_interval:
            return
        limits = (now, _SWEPT_AT_ONCE)
        swept = db.execute(
            "DELETE FROM umbel_results WHERE seq IN"
            " (SELECT seq FROM umbel_results WHERE expires IS NOT NULL AND expires <= ? LIMIT ?)",
            limits,
        ).rowcount
        swept += db.execute(
            "DELETE FROM umbel_claims WHERE fence IN (SELECT fence FROM umbel_claims WHERE until <= ? LIMIT ?)", limits
        ).rowcount
        joins = "SELECT key FROM umbel_joins WHERE expires IS NOT NULL AND expires <= ? LIMIT ?"
        for (key,) in db.execute(joins, limits).fetchall():
            self._drop_join(db, key)
            swept += 1
        if swept < _SWEPT_AT_ONCE:
            self._swept = time.monotonic()

    # --- joins -----------------------------------------------------------------------------------

    def join(self, db: sqlite3.Connection, payloads: Sequence[Join]) -> Sequence[JoinState]:
        return [self._join(db, join, self._clock.time()) for join in payloads]

    def _join(self, db: sqlite3.Connection, join: Join, now: float) -> JoinState:
        row = db.execute("SELECT expires FROM umbel_joins WHERE key = ?", (join.key,)).fetchone()
        if row is not None and row[0] is not None and row[0] <= now:
            self._drop_join(db, join.key)
        db.execute("INSERT INTO umbel_joins (key, marked) VALUES (?, ?) ON CONFLICT DO NOTHING", (join.key, now))
        added = db.executemany(
            "INSERT INTO umbel_marks VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            [(join.key, member, value) for member, value in join.marks.items()],
        ).rowcount
        db.execute(
            "UPDATE umbel_joins SET count = count + :added, size = coalesce(:size, size),"
            " marked = iif(:marks, :now, marked), lifetime = coalesce(:lifetime, lifetime) WHERE key = :key",
            {
                "added": max(0, added),
                "size": join.size,
                "marks": len(join.marks),
                "now": now,
                "lifetime": join.expires,
                "key": join.key,
            },
        )
        fires = db.execute(
            "UPDATE umbel_joins SET owner = ?, until = ?"
            " WHERE key = ? AND fired = 0 AND count >= size AND (until <= ? OR owner = ?)",
            (join.owner, now + join.lease, join.key, now, join.owner),
        ).rowcount
        count, size = db.execute("SELECT count, size FROM umbel_joins WHERE key = ?", (join.key,)).fetchone()
        return JoinState(count=count, size=size, fires=fires == 1)

    def _drop_join(self, db: sqlite3.Connection, key: str) -> None:
        db.execute("DELETE FROM umbel_marks WHERE key = ?", (key,))
        db.execute("DELETE FROM umbel_joins WHERE key = ?", (key,))

    def members(self, db: sqlite3.Connection, payloads: Sequence[str]) -> Sequence[dict[str, bytes]]:
        sql = f"SELECT member, value FROM umbel_marks JOIN umbel_joins USING (key) WHERE key = ? AND {_VISIBLE}"
        now = self._clock.time()
        return [dict(db.execute(sql, (key, now)).fetchall()) for key in payloads]

    def fired(self, db: sqlite3.Connection, payloads: Sequence[tuple[str, str]]) -> Sequence[bool]:
        sql = "UPDATE umbel_joins SET fired = 1 WHERE key = ? AND owner = ?"
        return [db.execute(sql, pair).rowcount == 1 for pair in payloads]

    def unfired(self, db: sqlite3.Connection, payloads: Sequence[int]) -> Sequence[list[str]]:
        now = self._clock.time()
        sql = (
            "SELECT key FROM umbel_joins INDEXED BY umbel_joins_unfired"
            f" WHERE fired = 0 AND count >= size AND until <= ? AND {_VISIBLE} ORDER BY until LIMIT ?"
        )
        return [[key for (key,) in db.execute(sql, (now, now, limit)).fetchall()] for limit in payloads]

    # --- claims ----------------------------------------------------------------------------------

    def claim(self, db: sqlite3.Connection, payloads: Sequence[Claim]) -> Sequence[Lease]:
        now = self._clock.time()
        leases = [self._claim(db, claim, now) for claim in payloads]
        self._sweep(db, now)
        return leases

    def _claim(self, db: sqlite3.Connection, claim: Claim, now: float) -> Lease:
        until, value = now + claim.lease, claim.value or b""
        row = db.execute(
            "SELECT owner, fence, until, value FROM umbel_claims WHERE name = ? AND until > ?", (claim.name, now)
        ).fetchone()
        if row is not None and row[0] != claim.owner:
            return Lease(name=claim.name, owner=row[0], fence=row[1], until=row[2], value=row[3])
        if row is not None:
            fence, value = row[1], row[3] if claim.value is None else value
            db.execute("UPDATE umbel_claims SET until = ?, value = ? WHERE fence = ?", (until, value, fence))
        else:
            db.execute("DELETE FROM umbel_claims WHERE name = ?", (claim.name,))
            fence = db.execute(
                "INSERT INTO umbel_claims (name, owner, until, value) VALUES (?, ?, ?, ?)",
                (claim.name, claim.owner, until, value),
            ).lastrowid
        return Lease(name=claim.name, owner=claim.owner, fence=fence, until=until, value=value)

    def release(self, db: sqlite3.Connection, payloads: Sequence[tuple[str, str, bytes | None]]) -> Sequence[bool]:
        now = self._clock.time()
        sql = "DELETE FROM umbel_claims WHERE name = ? AND owner = ? AND value = coalesce(?, value) AND until > ?"
        return [db.execute(sql, (*given, now)).rowcount == 1 for given in payloads]

    def claims(self, db: sqlite3.Connection, payloads: Sequence[str]) -> Sequence[list[Lease]]:
        now = self._clock.time()
        sql = (
            "SELECT name, owner, fence, until, value FROM umbel_claims"
            " WHERE name >= :prefix AND substr(name, 1, length(:prefix)) = :prefix AND until > :now ORDER BY name"
        )
        return [
            [
                Lease(name=name, owner=owner, fence=fence, until=until, value=value)
                for name, owner, fence, until, value in db.execute(sql, {"prefix": prefix, "now": now}).fetchall()
            ]
            for prefix in payloads
        ]


def _result(row: tuple[Any, ...]) -> Result:
    task_id, state, document, content_type, content_encoding, lifetime = row
    return Result(
        task_id=task_id,
        state=state,
        document=document,
        content_type=content_type,
        content_encoding=content_encoding,
        expires=lifetime,
    )
