"""Dead letters: finding them, and taking chosen ones off their queue without losing any."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, cast

from attrs import define, field, frozen

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
    evolve,
    without_route,
)
from umbel.ports.transport import Credit
from umbel.protocol import BROKER_HEADERS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from umbel.ports.transport import Transport

_PAGE: Final = 100
_LEASE: Final = 60.0
"""Seconds that a letter may be held; renewed between batches, each of which takes some seconds at most."""


@frozen
class Letter:
    """One dead letter."""

    queue: str
    """The queue of dead letters that holds it."""
    message: Message

    @property
    def id(self) -> str:
        """The task id; empty where only an unread body knows it."""
        return self.message.id or str(self.message.properties.get("correlation_id") or "")

    @property
    def cause(self) -> str:
        return str(self.message.headers.get(HEADER_DEAD_CAUSE) or "")

    @property
    def origin(self) -> str:
        """The queue that it was taken from, and goes back to."""
        return str(self.message.headers.get(HEADER_DEAD_QUEUE) or self.queue.removesuffix(DEAD_SUFFIX))

    @property
    def died_at(self) -> Any:
        return self.message.headers.get(HEADER_DEAD_AT)

    @property
    def deliveries(self) -> Any:
        return self.message.headers.get(HEADER_DEAD_COUNT)

    def revived(self) -> Message:
        """The message as it was sent, for the queue that it came from: the same task id, and no trace of its death."""
        headers = {name: value for name, value in self.message.headers.items() if name not in BROKER_HEADERS}
        headers |= {"retries": 0, "eta": None} if "retries" in headers else {}
        properties = without_route(self.message.properties)
        return evolve(self.message, queue=self.origin, headers=headers, due=None, properties=properties)


Act = Callable[[Sequence[Letter]], Awaitable[None]]


@frozen(kw_only=True)
class Selection:
    """Which letters are meant: those that meet every condition given."""

    ids: frozenset[str] = frozenset()
    task: str | None = None
    """Name or glob."""
    cause: str | None = None
    """Part of the cause, in any case."""

    def __call__(self, letter: Letter) -> bool:
        return (
            (not self.ids or letter.id in self.ids)
            and (self.task is None or fnmatchcase(letter.message.task, self.task))
            and (self.cause is None or self.cause.lower() in letter.cause.lower())
        )


async def find(transport: Transport, queue: str, selection: Selection) -> AsyncIterator[Letter]:
    """The chosen letters of one queue, as they wait there now; none is taken."""
    offset = 0
    while page := await transport.peek(queue, limit=_PAGE, offset=offset):
        for message in page:
            if selection(letter := Letter(queue, message)):
                yield letter
        offset += len(page)


@define
class Taken:
    """What ``take`` has done so far, to be told even if it fails half-way."""

    ids: list[str] = field(factory=list)
    late: int = 0
    """Letters dealt with whose lease had ended by then: they may still lie where they were."""


async def take(transport: Transport, queue: str, selection: Selection, act: Act, *, at_most: int, taken: Taken) -> None:
    """Take the chosen letters off ``queue``, each only after ``act`` has dealt with it; the others stay, uncounted.

    A crash, or an error of ``act``, leaves a letter where it was, or does its part twice; never is one lost. Letters
    that die while this runs are not looked at, so that a task that fails at once is not replayed for ever.

    ``at_most``: how many chosen letters there are, to stop early. Raises what ``act`` raises, ``BrokerUnavailable``.
    """
    bound = (await transport.depth([queue]))[queue].ready
    if not bound:
        return
    credit = Credit(bound)  # never given back: what is not chosen is held to the end, or it would come again at once
    held: list[Delivery] = []
    seen = dealt_with = 0
    renewed = time.monotonic()
    stream = cast("AsyncGenerator[Sequence[Delivery]]", transport.consume([queue], credit=credit, lease=_LEASE))
    try:
        async with aclosing(stream):
            async for batch in stream:
                if not batch:
                    break  # others have taken the rest
                seen += len(batch)
                chosen = [d for d in batch if selection(Letter(queue, d.message))]
                held += batch
                if chosen:
                    letters = [Letter(queue, d.message) for d in chosen]
                    await act(letters)
                    gone = set(map(id, chosen))
                    held = [d for d in held if id(d) not in gone]
                    done = await transport.settle([Settlement(delivery=d, action=Action.ACK) for d in chosen])
                    dealt_with += len(chosen)
                    taken.ids += [letter.id for letter in letters]
                    taken.late += list(done).count(False)
                if dealt_with >= at_most or seen >= bound:
                    break
                if held and time.monotonic() - renewed > _LEASE / 3:
                    await transport.renew(held, lease=_LEASE)
                    renewed = time.monotonic()
    finally:
        if held:
            await transport.settle([Settlement(delivery=d, action=Action.REQUEUE, counted=False) for d in held])
