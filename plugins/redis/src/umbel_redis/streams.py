"""Names of keys, messages as stream entries, and what the scripts are told and answer. No I/O."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]  # msgpack's gap

from umbel.errors import PublishRefused
from umbel.model import (
    DEAD_SUFFIX,
    HEADER_DEAD_AT,
    HEADER_DEAD_CAUSE,
    HEADER_DEAD_COUNT,
    HEADER_DEAD_QUEUE,
    Action,
    Delivery,
    Message,
    Settlement,
    dead_letter_queue,
    evolve,
)
from umbel_redis.scripts import CLAIM, PUBLISH, RENEW, SETTLE
from umbel_redis.session import Command, Value

LEVELS: Final = 10
MOST_AT_ONCE: Final = 1000
"""Messages that one script handles: the server serves nobody else meanwhile."""
_LATEST: Final = 2.0**40
"""Unix time beyond which milliseconds are not kept apart."""
_LARGEST_AT_ONCE: Final = 4 * 2**20
"""Bytes that one script publishes, unless one message alone has more."""


class Keys:
    """The keys of one queue. They share the hash tag, and with it the slot, with those of the queue's dead letters."""

    def __init__(self, prefix: str, queue: str) -> None:
        alive, dead = queue, ""
        while alive.endswith(DEAD_SUFFIX):
            alive, dead = alive.removesuffix(DEAD_SUFFIX), dead + DEAD_SUFFIX
        tag = alive.replace("%", "%25").replace("{", "%7B").replace("}", "%7D") or "%"  # an empty tag is none
        base = f"{prefix}umbel:{{{tag}}}{dead}:"
        try:
            base.encode()
        except UnicodeEncodeError as error:
            raise PublishRefused(f"queue {queue!r} has a name that is no text: {error}") from None
        self.queue = queue
        self.levels = f"{base}levels"
        self.held = f"{base}held"
        self.again = f"{base}again"
        self.paused = f"{base}paused"
        self.delayed = f"{base}delayed"
        self.starts = f"{base}starts"
        self.wake = f"{base}wake"
        self.streams = tuple(f"{base}{level}" for level in range(LEVELS))
        self.all = (
            self.levels,
            self.held,
            self.again,
            self.paused,
            self.delayed,
            self.starts,
            self.wake,
            *reversed(self.streams),
        )


# --- messages ------------------------------------------------------------------------------------

_local = threading.local()


def _packer() -> msgpack.Packer:
    """This thread's: a packer is not thread-safe, and costs more to make than a head to pack."""
    try:
        return _local.packer
    except AttributeError:
        _local.packer = msgpack.Packer()
        return _local.packer


def encode_head(message: Message) -> bytes:
    """All of a message but body, queue and priority. Raises ``PublishRefused`` for what is not plain data."""
    head: list[Any] = [_plain(message.headers), _plain(message.properties)]
    kind = (message.content_type, message.content_encoding, message.due)
    if kind != _USUAL:
        head += kind
    try:
        return bytes(_packer().pack(head))
    except (TypeError, ValueError, OverflowError) as error:
        del _local.packer  # it may keep the beginning of what failed
        raise PublishRefused(f"a header or property of message {message.id!r} is no plain data: {error}") from None


_USUAL: Final = ("application/json", "utf-8", None)


def _plain(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return mapping if type(mapping) is dict else dict(mapping)


_UNREADABLE: Final[tuple[Any, ...]] = ({}, {}, "application/x-unreadable", "binary", None)


def decode_message(queue: str, level: int, head: bytes, body: bytes) -> Message:
    """An entry that somebody else has added is a message that no codec takes: it goes the way of the unreadable."""
    try:
        headers, properties, *kind = msgpack.unpackb(head, strict_map_key=False)
        content_type, content_encoding, due = kind or _USUAL
    except (ValueError, TypeError, msgpack.UnpackException):
        headers, properties, content_type, content_encoding, due = _UNREADABLE
    return Message(
        queue=queue,
        headers=headers,
        body=body,
        content_type=content_type,
        content_encoding=content_encoding,
        priority=level,
        due=due,
        properties=properties,
    )


def decode_delayed(queue: str, member: bytes) -> Message:
    """A member of ``delayed``: sixteen digits, the level, the head's size, a colon, head, body."""
    size, _, rest = member[17:].partition(b":")
    return decode_message(queue, member[16] - 48, rest[: int(size)], rest[int(size) :])


# --- publish -------------------------------------------------------------------------------------


def publishing(keys: Keys, messages: Sequence[Message], now: float) -> Iterator[Command]:
    """The calls that publish ``messages``, all of one queue; none holds more than the server should do in one step."""
    ready: dict[int, list[Value]] = {}
    delayed: list[Value] = []
    number = size = 0
    for message in messages:
        head, body, level = encode_head(message), message.body, _level(message)
        if number and (number >= MOST_AT_ONCE or size + len(head) + len(body) > _LARGEST_AT_ONCE):
            yield _publishing(keys, ready, delayed)
            ready, delayed = {}, []
            number = size = 0
        if message.due is not None and message.due > now:
            if message.due > _LATEST:
                raise PublishRefused(f"message {message.id!r} is due at {message.due}, which is no point in time")
            delayed += (math.ceil(message.due * 1000), level, b"%d:%b%b" % (len(head), head, body))
        elif level in ready:
            ready[level] += (head, body)
        else:
            ready[level] = [head, body]
        number += 1
        size += len(head) + len(body)
    yield _publishing(keys, ready, delayed)


def _publishing(keys: Keys, ready: Mapping[int, list[Value]], delayed: list[Value]) -> Command:
    args: list[Value] = []
    for level, pairs in ready.items():
        args += (level, len(pairs) // 2)
        args += pairs
    streams = [keys.streams[level] for level in ready]
    return PUBLISH.on((keys.levels, keys.delayed, keys.wake, *streams), *args, *delayed)


def _level(message: Message) -> int:
    if 0 <= message.priority < LEVELS:
        return message.priority
    raise PublishRefused(f"message {message.id!r}: priority is 0 to 9, higher is sooner; {message.priority} is not")


# --- claim ---------------------------------------------------------------------------------------


def claiming(queues: Sequence[Keys], most: int, lease: float, fence: str) -> Command:
    return CLAIM.on([key for keys in queues for key in keys.all], most, math.ceil(lease * 1000), fence)


def claimed(queues: Sequence[Keys], batches: Sequence[Any], until: float, fence: str) -> list[Delivery]:
    """The deliveries of an answer to ``claiming``; the token of each is its member in ``held``."""
    deliveries: list[Delivery] = []
    tail = fence.encode()
    for at, level, flat, counts, starts in batches:
        queue = queues[at].queue
        deliveries += [
            Delivery(
                message=decode_message(queue, level, flat[i + 1], flat[i + 2]),
                queue=queue,
                token=b"%d:%b:%b" % (level, flat[i], tail),
                count=counts[i // 3] if counts else 1,
                starts=int(starts[i // 3] or 0) if starts else 0,
                leased_until=until,
            )
            for i in range(0, len(flat), 3)
        ]
    return deliveries


# --- settle and renew ----------------------------------------------------------------------------


def settling(
    keys_of: Callable[[str], Keys], settlements: Sequence[Settlement], now: float
) -> Iterator[tuple[Command, Sequence[int]]]:
    """The calls that settle a batch, each with the places of its answers in the batch.

    A delivery that is settled twice in it has no place the second time.
    """
    by_queue: dict[str, list[tuple[int, Settlement]]] = {}
    seen: set[bytes] = set()
    for place, settlement in enumerate(settlements):
        delivery = settlement.delivery
        if (token := delivery.token) not in seen:
            seen.add(token)
            if (some := by_queue.get(delivery.queue)) is None:
                some = by_queue[delivery.queue] = []
            some.append((place, settlement))
    for queue, some in by_queue.items():
        for start in range(0, len(some), MOST_AT_ONCE):
            yield _settling(keys_of, queue, some[start : start + MOST_AT_ONCE], now)


def _settling(
    keys_of: Callable[[str], Keys], queue: str, settlements: Sequence[tuple[int, Settlement]], now: float
) -> tuple[Command, Sequence[int]]:
    acks: list[bytes] = []
    others: list[Value] = []
    places: list[int] = []
    other_places: list[int] = []
    keys: Sequence[str] = keys_of(queue).all
    buries = False
    for place, settlement in settlements:
        delivery = settlement.delivery
        if settlement.action is Action.ACK:
            acks.append(delivery.token)
            places.append(place)
            continue
        other_places.append(place)
        if settlement.action is Action.DEAD:
            buries = True
            others += (delivery.token, "dead", encode_head(_letter(settlement, now)), "")
        else:
            counts = "" if settlement.counted else f"{delivery.count - 1}:{delivery.starts}"
            others += (delivery.token, "again", math.ceil(max(0.0, settlement.delay) * 1000), counts)
    if buries:
        keys = (*keys, *keys_of(dead_letter_queue(queue)).all)
    return SETTLE.on(keys, len(acks), *acks, *others), places + other_places


def _letter(settlement: Settlement, now: float) -> Message:
    delivery = settlement.delivery
    told = {
        HEADER_DEAD_CAUSE: settlement.cause,
        HEADER_DEAD_QUEUE: delivery.queue,
        HEADER_DEAD_AT: now,
        HEADER_DEAD_COUNT: delivery.count,
    }
    return evolve(delivery.message, headers={**delivery.message.headers, **told}, due=None)


def renewing(
    keys_of: Callable[[str], Keys], deliveries: Sequence[Delivery], lease: float, starting: bool
) -> Iterator[tuple[Command, Sequence[int]]]:
    """The calls that renew leases, each with the places of its answers in the batch."""
    by_queue: dict[str, list[int]] = {}
    for place, delivery in enumerate(deliveries):
        by_queue.setdefault(delivery.queue, []).append(place)
    for queue, places in by_queue.items():
        keys = keys_of(queue)
        for start in range(0, len(places), MOST_AT_ONCE):
            part = places[start : start + MOST_AT_ONCE]
            leases = [deliveries[place].token for place in part]
            yield RENEW.on((keys.held, keys.starts), math.ceil(lease * 1000), int(starting), *leases), part


def carried_out(size: int, places: Sequence[Sequence[int]], lost: Sequence[Sequence[int]]) -> list[bool]:
    """What of a batch was carried out: what has a place in a call, less that call's ``lost``, counted from one."""
    done = [False] * size
    for part, numbers in zip(places, lost, strict=True):
        for place in part:
            done[place] = True
        for number in numbers:
            done[part[number - 1]] = False
    return done
