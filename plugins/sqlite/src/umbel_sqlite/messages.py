"""The broker's tables, and the verbs that work on them. Everything here runs on the database's thread.

A message is *ready* (may be claimed), *leased*, or *delayed*. Ready rows are in one partial index, in the order in which
they are claimed; the others in another, by the time until which they wait. So a claim reads as many index entries as it
claims, however long the backlog is and however much of it is delayed. A claim first makes ready what has become due and
what was leased too long ago.
"""

from __future__ import annotations

import base64
import json
import secrets
import sqlite3
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

from attrs import frozen

from umbel.model import (
    HEADER_DEAD_AT,
    HEADER_DEAD_CAUSE,
    HEADER_DEAD_COUNT,
    HEADER_DEAD_QUEUE,
    Action,
    Delivery,
    Message,
    Settlement,
    dead_letter_queue,
)
from umbel.ports.clock import Clock
from umbel.ports.transport import QueueDepth
from umbel_sqlite.connection import Schema
from umbel_sqlite.faults import Fault

READY, LEASED, DELAYED = 0, 1, 2

SCHEMA: Final = Schema(
    part="broker",
    version=1,
    script=(
        # `fence` is a random number drawn at each claim; minus that number once it is given back. Its default is as long
        # as any later value, and `until` always has a fraction of its own: a row that keeps its size is changed in place.
        """CREATE TABLE umbel_messages (
            id INTEGER PRIMARY KEY,
            queue TEXT NOT NULL,
            priority INTEGER NOT NULL,
            state INTEGER NOT NULL,
            until REAL NOT NULL,
            since REAL NOT NULL,
            claims INTEGER NOT NULL DEFAULT 0,
            starts INTEGER NOT NULL DEFAULT 0,
            fence INTEGER NOT NULL DEFAULT -4611686018427387904,
            due REAL,
            head TEXT NOT NULL,
            body BLOB NOT NULL
        )""",
        "CREATE INDEX umbel_messages_ready ON umbel_messages (queue, priority DESC, since, id) WHERE state = 0",
        "CREATE INDEX umbel_messages_waiting ON umbel_messages (until, state, queue) WHERE state > 0",
        "CREATE TABLE umbel_queues (name TEXT PRIMARY KEY) WITHOUT ROWID",
        """CREATE TABLE umbel_broadcasts (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            topic TEXT NOT NULL,
            key TEXT NOT NULL,
            payload BLOB NOT NULL,
            at REAL NOT NULL
        )""",
    ),
)

_INSERT: Final = "INSERT INTO umbel_messages (queue, priority, state, until, since, due, head, body) VALUES "
_ROW: Final = "(?, ?, ?, ?, ?, ?, ?, ?)"
_CHUNKS: Final = (100, 10, 1)
"""Rows of one INSERT: few sizes, so that each stays compiled; many rows, so that the interpreter lock is released seldom."""

PROMOTE: Final = """UPDATE umbel_messages SET state = 0 WHERE id IN (
    SELECT id FROM umbel_messages INDEXED BY umbel_messages_waiting WHERE state > 0 AND until <= ? ORDER BY until LIMIT ?)"""
NEXT_DUE: Final = "SELECT min(until) FROM umbel_messages INDEXED BY umbel_messages_waiting WHERE state > 0"
CLAIMABLE: Final = """SELECT id, queue, priority, claims, starts, due, head, body FROM umbel_messages WHERE id IN (
    SELECT m.id FROM json_each(:queues) AS q CROSS JOIN umbel_messages AS m WHERE m.id IN (
        SELECT id FROM umbel_messages INDEXED BY umbel_messages_ready WHERE queue = q.value AND state = 0
        ORDER BY priority DESC, since, id LIMIT :limit))
    ORDER BY priority DESC, since, id LIMIT :limit"""
_CLAIM: Final = """UPDATE umbel_messages SET state = 1, until = ?, fence = ?, claims = claims + 1
    WHERE id IN (SELECT value FROM json_each(?))"""
HELD: Final = """SELECT json_group_array(t.key) FROM json_each(?) AS t CROSS JOIN umbel_messages AS m
    ON m.id = json_extract(t.value, '$[0]') AND m.fence = json_extract(t.value, '$[1]')"""
_GIVE_BACK: Final = """UPDATE umbel_messages SET state = ?, until = ?, fence = -fence, claims = claims - ?,
    starts = coalesce(?, starts) WHERE id = ?"""
_BURY: Final = """UPDATE umbel_messages SET queue = ?, state = 0, until = ?, since = ?, fence = -fence, claims = 0,
    starts = 0, due = NULL, head = ? WHERE id = ?"""
_PEEK_READY: Final = """SELECT queue, priority, due, head, body FROM umbel_messages WHERE queue = ? AND state = 0
    ORDER BY priority DESC, since, id LIMIT ? OFFSET ?"""
_PEEK_DELAYED: Final = """SELECT queue, priority, due, head, body FROM umbel_messages
    WHERE queue = ? AND state > 0 AND state = 2 ORDER BY until, id LIMIT ? OFFSET ?"""

_PROMOTED_AT_ONCE: Final = 1000
_PURGED_AT_ONCE: Final = 5000
_BROADCAST_KEPT: Final = 60.0
"""Seconds for which a subscriber that only polls, or is slow, can still find a broadcast."""
_BROADCASTS_AT_ONCE: Final = 200


@frozen
class Token:
    """The row, and the number of this handing-out."""

    id: int
    fence: int


@frozen(kw_only=True)
class ClaimRequest:
    queues: str
    """A JSON list of names."""
    limit: int
    lease: float


class Messages:
    """The verbs: each takes all the payloads that wait for it, and returns one answer for each."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def publish(self, db: sqlite3.Connection, payloads: Sequence[Sequence[Message]]) -> Sequence[None]:
        now = self._clock.time()
        rows: list[tuple[Any, ...]] = []
        for message in chain.from_iterable(payloads):
            delayed = message.due is not None and message.due > now
            since = message.due if delayed else now
            state = DELAYED if delayed else READY
            head = encode_head(message)
            rows.append((message.queue, message.priority, state, since, since, message.due, head, message.body))
        start = 0
        for size in _CHUNKS:
            while len(rows) - start >= size:
                values = ",".join([_ROW] * size)
                db.execute(_INSERT + values, list(chain.from_iterable(rows[start : start + size])))
                start += size
        return [None] * len(payloads)

    def claim(
        self, db: sqlite3.Connection, payloads: Sequence[ClaimRequest]
    ) -> Sequence[tuple[list[Delivery], float | None]]:
        """Deliveries for each request, and the next time at which anything may become ready without a hint."""
        now = self._clock.time()
        self._promote(db, now)
        batches = [self._claim(db, request, now) for request in payloads]
        (next_due,) = db.execute(NEXT_DUE).fetchone()
        return [(batch, next_due) for batch in batches]

    def _claim(self, db: sqlite3.Connection, request: ClaimRequest, now: float) -> list[Delivery]:
        rows = db.execute(CLAIMABLE, {"queues": request.queues, "limit": request.limit}).fetchall()
        if not rows:
            return []
        until = now + request.lease
        fence = (1 << 61) + secrets.randbits(61)
        db.execute(_CLAIM, (until, fence, json.dumps([row[0] for row in rows])))
        return [
            Delivery(
                message=decode_message(queue, priority, due, head, body),
                queue=queue,
                token=Token(id_, fence),
                count=claims + 1,
                starts=starts,
                leased_until=until,
            )
            for id_, queue, priority, claims, starts, due, head, body in rows
        ]

    def _promote(self, db: sqlite3.Connection, now: float) -> None:
        db.execute(PROMOTE, (now, _PROMOTED_AT_ONCE))

    def settle(self, db: sqlite3.Connection, payloads: Sequence[Sequence[Settlement]]) -> Sequence[list[bool]]:
        now = self._clock.time()
        settlements = list(chain.from_iterable(payloads))
        held = self._held(db, [settlement.delivery.token for settlement in settlements])
        if acked := [settlements[i].delivery.token.id for i in held if settlements[i].action is Action.ACK]:
            db.execute("DELETE FROM umbel_messages WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(acked),))
        for i in held:
            settlement = settlements[i]
            if settlement.action is Action.REQUEUE:
                starts = None if settlement.counted else settlement.delivery.starts  # nor does its start count
                self._requeue(db, settlement.delivery.token, settlement.delay, settlement.counted, now, starts)
            elif settlement.action is Action.DEAD:
                self._bury(db, settlement, now)
        return _split([i in held for i in range(len(settlements))], payloads)

    def renew(
        self, db: sqlite3.Connection, payloads: Sequence[tuple[Sequence[Token], float, bool]]
    ) -> Sequence[list[bool]]:
        now = self._clock.time()
        answers: list[list[bool]] = []
        for tokens, lease, starting in payloads:
            held = self._held(db, tokens)
            ids = json.dumps([tokens[i].id for i in held])
            db.execute(
                "UPDATE umbel_messages SET state = 1, until = ?, starts = starts + ?"
                " WHERE id IN (SELECT value FROM json_each(?))",
                (now + lease, int(starting), ids),
            )
            answers.append([i in held for i in range(len(tokens))])
        return answers

    def give_back(self, db: sqlite3.Connection, payloads: Sequence[Sequence[Token]]) -> Sequence[None]:
        """Make leased messages ready again at once, uncounted."""
        now = self._clock.time()
        tokens = list(chain.from_iterable(payloads))
        for i in self._held(db, tokens):
            self._requeue(db, tokens[i], 0.0, counted=False, now=now)
        return [None] * len(payloads)

    def _held(self, db: sqlite3.Connection, tokens: Sequence[Token]) -> set[int]:
        """The positions of those tokens whose handing-out is still the latest; of equal tokens, the first."""
        (held,) = db.execute(HELD, (json.dumps([(token.id, token.fence) for token in tokens]),)).fetchone()
        first: dict[int, int] = {}
        for i in json.loads(held):
            first.setdefault(tokens[i].id, i)
        return set(first.values())

    def _requeue(
        self, db: sqlite3.Connection, token: Token, delay: float, counted: bool, now: float, starts: int | None = None
    ) -> None:
        state = DELAYED if delay > 0 else READY
        db.execute(_GIVE_BACK, (state, now + max(0.0, delay), int(not counted), starts, token.id))

    def _bury(self, db: sqlite3.Connection, settlement: Settlement, now: float) -> None:
        delivery = settlement.delivery
        row = db.execute("SELECT head FROM umbel_messages WHERE id = ?", (delivery.token.id,)).fetchone()
        headers, *rest = _decode(row[0])
        headers[HEADER_DEAD_CAUSE] = settlement.cause
        headers[HEADER_DEAD_QUEUE] = delivery.queue
        headers[HEADER_DEAD_AT] = now
        headers[HEADER_DEAD_COUNT] = delivery.count
        db.execute(_BURY, (dead_letter_queue(delivery.queue), now, now, _encode([headers, *rest]), delivery.token.id))

    def declare(self, db: sqlite3.Connection, payloads: Sequence[Sequence[str]]) -> Sequence[None]:
        names = [(name,) for name in chain.from_iterable(payloads)]
        db.executemany("INSERT INTO umbel_queues VALUES (?) ON CONFLICT DO NOTHING", names)
        return [None] * len(payloads)

    def purge(self, db: sqlite3.Connection, payloads: Sequence[tuple[str, int | None]]) -> Sequence[tuple[int, int]]:
        """Delete some messages of a queue up to an id; without one, up to the last there is: how many, and that id."""
        now = self._clock.time()
        self._promote(db, now)
        answers: list[tuple[int, int]] = []
        for queue, horizon in payloads:
            last = db.execute("SELECT max(id) FROM umbel_messages").fetchone()[0] or 0 if horizon is None else horizon
            deleted = db.execute(
                "DELETE FROM umbel_messages WHERE id IN (SELECT id FROM umbel_messages"
                " WHERE queue = ? AND state = 0 AND id <= ? LIMIT ?)",
                (queue, last, _PURGED_AT_ONCE),
            ).rowcount
            deleted += db.execute(
                "DELETE FROM umbel_messages WHERE id IN (SELECT id FROM umbel_messages"
                " WHERE queue = ? AND state > 0 AND (state = 2 OR until <= ?) AND id <= ? LIMIT ?)",
                (queue, now, last, _PURGED_AT_ONCE),
            ).rowcount
            answers.append((deleted, last))
        return answers

    def depth(self, db: sqlite3.Connection, payloads: Sequence[Sequence[str]]) -> Sequence[dict[str, QueueDepth]]:
        now = self._clock.time()
        return [self._depth(db, names, now) for names in payloads]

    def _depth(self, db: sqlite3.Connection, names: Sequence[str], now: float) -> dict[str, QueueDepth]:
        only = " AND queue IN (SELECT value FROM json_each(?))" if names else ""
        chosen = (json.dumps(list(names)),) if names else ()
        known = names or [name for (name,) in db.execute("SELECT name FROM umbel_queues").fetchall()]
        counts: dict[str, dict[str, int]] = {name: {"ready": 0, "delayed": 0, "leased": 0} for name in known}
        oldest: dict[str, float] = {}

        def add(queue: str, kind: str, number: int, since: float) -> None:
            counts.setdefault(queue, {"ready": 0, "delayed": 0, "leased": 0})[kind] += number
            if kind == "ready":
                oldest[queue] = min(since, oldest.get(queue, since))

        ready = "SELECT queue, count(*), min(since) FROM umbel_messages WHERE state = 0"
        for queue, number, since in db.execute(f"{ready}{only} GROUP BY queue", chosen).fetchall():
            add(queue, "ready", number, since)
        waiting = "SELECT queue, state, until <= ?, count(*), min(until) FROM umbel_messages WHERE state > 0"
        for queue, state, over, number, until in db.execute(
            f"{waiting}{only} GROUP BY queue, state, until <= ?", (now, *chosen, now)
        ).fetchall():
            add(queue, "ready" if over else "leased" if state == LEASED else "delayed", number, until)
        return {queue: QueueDepth(**kinds, oldest=oldest.get(queue)) for queue, kinds in counts.items()}

    def peek(self, db: sqlite3.Connection, payloads: Sequence[tuple[str, int, int]]) -> Sequence[list[Message]]:
        """Ready messages as they would be claimed, then delayed ones by their time."""
        self._promote(db, self._clock.time())
        answers: list[list[Message]] = []
        for queue, limit, offset in payloads:
            rows = db.execute(_PEEK_READY, (queue, limit, offset)).fetchall()
            if len(rows) < limit:
                count = "SELECT count(*) FROM umbel_messages WHERE queue = ? AND state = 0"
                (ready,) = db.execute(count, (queue,)).fetchone()
                rows += db.execute(_PEEK_DELAYED, (queue, limit - len(rows), max(0, offset - ready))).fetchall()
            answers.append([decode_message(*row) for row in rows])
        return answers

    def broadcast(self, db: sqlite3.Connection, payloads: Sequence[tuple[str, str, bytes]]) -> Sequence[None]:
        now = self._clock.time()
        insert = "INSERT INTO umbel_broadcasts (topic, key, payload, at) VALUES (?, ?, ?, ?)"
        db.executemany(insert, [(*payload, now) for payload in payloads])
        db.execute(
            "DELETE FROM umbel_broadcasts WHERE id IN (SELECT id FROM umbel_broadcasts ORDER BY id LIMIT ?) AND at < ?",
            (2 * len(payloads) + 10, now - _BROADCAST_KEPT),
        )
        return [None] * len(payloads)

    def last_broadcast(self, db: sqlite3.Connection, payloads: Sequence[None]) -> Sequence[int]:
        row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'umbel_broadcasts'").fetchone()
        return [row[0] if row else 0] * len(payloads)

    def heard(
        self, db: sqlite3.Connection, payloads: Sequence[tuple[str, int]]
    ) -> Sequence[list[tuple[int, str, bytes]]]:
        """What was said to a topic after the broadcast of that number."""
        select = "SELECT id, key, payload FROM umbel_broadcasts WHERE id > ? AND topic = ? ORDER BY id LIMIT ?"
        return [db.execute(select, (last, topic, _BROADCASTS_AT_ONCE)).fetchall() for topic, last in payloads]

    def ping(self, db: sqlite3.Connection, payloads: Sequence[None]) -> Sequence[None]:
        db.execute("SELECT 1 FROM umbel_queues LIMIT 1").fetchone()
        return [None] * len(payloads)


def _split(flat: list[bool], like: Sequence[Sequence[Any]]) -> list[list[bool]]:
    ends = 0
    parts: list[list[bool]] = []
    for part in like:
        parts.append(flat[ends : ends + len(part)])
        ends += len(part)
    return parts


# --- what a message says, as one JSON text: [headers, properties, content type, content encoding] --------------------

_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_WITH_BYTES: Final = "!"
"""Begins a text in which bytes are ``{"b": base64}`` and dictionaries ``{"d": …}``. No JSON text begins with it."""


def encode_head(message: Message) -> str:
    """Raises ``Fault`` for what is not plain data."""
    head = [dict(message.headers), dict(message.properties), message.content_type, message.content_encoding]
    try:
        return _encode(head)
    except TypeError as error:
        raise Fault(
            f"a header or property of message {message.id!r} is no plain data: {error}", permanent=True
        ) from None


def decode_message(queue: str, priority: int, due: float | None, head: str, body: bytes) -> Message:
    headers, properties, content_type, content_encoding = _decode(head)
    return Message(
        queue=queue,
        headers=headers,
        body=body,
        content_type=content_type,
        content_encoding=content_encoding,
        priority=priority,
        due=due,
        properties=properties,
    )


def _encode(value: Any) -> str:
    try:
        return _to_json(value)
    except TypeError:
        return _WITH_BYTES + _to_json(_tagged(value))


def _decode(text: str) -> Any:
    return _untagged(json.loads(text[1:])) if text.startswith(_WITH_BYTES) else json.loads(text)


def _tagged(value: Any) -> Any:
    match value:
        case bytes():
            return {"b": base64.b64encode(value).decode("ascii")}
        case dict():
            return {"d": {key: _tagged(inner) for key, inner in value.items()}}
        case list() | tuple():
            return [_tagged(inner) for inner in value]
    return value


def _untagged(value: Any) -> Any:
    match value:
        case {"b": str(text)}:
            return base64.b64decode(text)
        case {"d": dict(inner)}:
            return {key: _untagged(each) for key, each in inner.items()}
        case list():
            return [_untagged(each) for each in value]
    return value
