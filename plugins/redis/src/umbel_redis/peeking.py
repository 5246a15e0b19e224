"""A look into a queue, page by page, that no consumer has to wait for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from umbel.model import Message
from umbel_redis.scripts import SURVEY
from umbel_redis.session import Session
from umbel_redis.streams import Keys, decode_delayed, decode_message

_PAGE: Final = 500


async def peek(session: Session, keys: Keys, limit: int, offset: int) -> Sequence[Message]:
    """Ready messages as they would be handed out, then delayed ones by their time. In several steps: what is handed out
    or published meanwhile may be missing or shown twice."""
    *_, levels = await session.call(SURVEY.on(keys.all, 1))
    found: list[Message] = []
    for level, again, unread, last in levels:
        for read, number in ((_again, again), (_unread, unread)):
            if len(found) < limit and offset < number:
                entries = await read(session, keys, level, last, offset, limit - len(found))
                found += [decode_message(keys.queue, level, *pair) for _, fields in entries for pair in fields.items()]
            offset = max(0, offset - number)
    if len(found) < limit:
        found += await _delayed(session, keys, offset, limit - len(found))
    return found


async def _again(session: Session, keys: Keys, level: int, last: bytes, offset: int, limit: int) -> list[Any]:
    prefix = str(9 - level)
    places = await session.call(("ZRANGEBYLEX", keys.again, f"[{prefix}", f"[{prefix}:", "LIMIT", offset, limit))
    return await _entries(session, [(keys.streams[level], place[35:]) for place in places])


async def _unread(session: Session, keys: Keys, level: int, last: bytes, offset: int, limit: int) -> list[Any]:
    """A stream cannot be entered in its middle: what is skipped is read too."""
    found: list[Any] = []
    while limit:
        number = min(_PAGE, offset + limit)
        page = await session.call(("XRANGE", keys.streams[level], b"(" + last, "+", "COUNT", number))
        found += page[offset : offset + limit]
        limit -= len(page[offset : offset + limit])
        offset = max(0, offset - len(page))
        if len(page) < number:
            break
        last = page[-1][0]
    return found


async def _delayed(session: Session, keys: Keys, offset: int, limit: int) -> list[Message]:
    paused: list[tuple[bytes, float]] = await session.call(("ZRANGE", keys.paused, 0, offset + limit - 1, "WITHSCORES"))
    if not paused:
        members = await session.call(("ZRANGE", keys.delayed, offset, offset + limit - 1))
        return [decode_delayed(keys.queue, member) for member in members]
    members = await session.call(("ZRANGE", keys.delayed, 0, offset + limit - 1, "WITHSCORES"))
    waiting = sorted([*_scored(paused, True), *_scored(members, False)])
    found: list[Message] = []
    for _, was_leased, member in waiting[offset : offset + limit]:
        if was_leased:
            level = member[0] - 48
            entries = await _entries(session, [(keys.streams[level], member[2:])])
            found += [decode_message(keys.queue, level, *pair) for _, fields in entries for pair in fields.items()]
        else:
            found.append(decode_delayed(keys.queue, member))
    return found


def _scored(answer: Sequence[Any], was_leased: bool) -> Iterator[tuple[float, bool, bytes]]:
    for member, due in zip(answer[::2], answer[1::2], strict=True):
        yield float(due), was_leased, member


async def _entries(session: Session, refs: Sequence[tuple[str, bytes]]) -> list[Any]:
    if not refs:
        return []
    answers = await session.run([("XRANGE", stream, id_, id_) for stream, id_ in refs])
    return [entry for answer in answers for entry in answer]
