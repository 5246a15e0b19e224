"""Names of keys, messages as stream entries, and what the scripts are told and answer. No I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

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
    make_delivery,
    make_message,
)
from umbel_redis import heads
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


def decode_message(queue: str, level: int, head: bytes, body: bytes) -> Message:
    """The message of an entry."""
    headers, properties, content_type, content_encoding, due = heads.decode(head)
    return make_message(queue, headers, body, content_type, content_encoding, level, due, properties)


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
        head, body, level = heads.encode(message), message.body, _level(message)
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
    tail = b":" + fence.encode()
    for at, level, flat, counts, starts in batches:
        queue = queues[at].queue
        mark = b"%d:" % level
        for i in range(0, len(flat), 3):
            id, head, body = flat[i : i + 3]
            deliveries.append(
                make_delivery(
                    decode_message(queue, level, head, body),
                    queue,
                    mark + id + tail,
                    counts[i // 3] if counts else 1,
                    int(starts[i // 3] or 0) if starts else 0,
                    until,
                )
            )
    return deliveries


# --- settle and renew ----------------------------------------------------------------------------


def settling(
    keys_of: Callable[[str], Keys], settlements: Sequence[Settlement], now: float
) -> Iterator[tuple[Command, Sequence[int]]]:
    """The calls that settle a batch, each with the places of its answers in the batch.

    A delivery that is settled twice in it has no place the second time.
    """
    queue, most = settlements[0].delivery.queue, len(settlements)
    done = [s.delivery.token for s in settlements if s.action is Action.ACK and s.delivery.queue == queue]
    if len(done) == most <= MOST_AT_ONCE and len(set(done)) == most:  # almost always
        yield SETTLE.on(keys_of(queue).all, most, *done), range(most)
        return
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
            others += (delivery.token, "dead", heads.encode(_letter(settlement, now)), "")
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
    if len(places) == 1 and len(places[0]) == size and not lost[0]:
        return [True] * size
    done = [False] * size
    for part, numbers in zip(places, lost, strict=True):
        for place in part:
            done[place] = True
        for number in numbers:
            done[part[number - 1]] = False
    return done
