"""Consuming: claims are one with their yielding, and what was claimed for nobody is given back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, Final
from uuid import uuid4

from attrs import frozen

from umbel.model import Delivery, Message, evolve
from umbel.ports.clock import Clock
from umbel.ports.transport import Credit
from umbel_celery import envelope, scripts
from umbel_celery.layout import Layout
from umbel_celery.options import TransportOptions
from umbel_celery.restoring import restore_overdue
from umbel_celery.session import FAULTS, Calls, Session, Watch

log = logging.getLogger("umbel.celery")

_LARGEST_BATCH: Final = 200
_LONGEST_SILENCE: Final = 5.0
"""Seconds within which ``consume`` yields, be it an empty batch."""
_SHORTEST_PAUSE: Final = 0.02
"""Seconds between two looks for what others are restoring at the same time."""


@frozen
class Token:
    """One handing-out: the message's name in ``unacked``, and the claim that took it."""

    tag: bytes
    claim: str


@frozen(kw_only=True)
class Request:
    """What a consumer asks for again and again."""

    queues: Sequence[str]
    keys: Sequence[str]
    watched: Sequence[str]
    lease: float


@frozen(kw_only=True)
class _Answer:
    deliveries: Sequence[Delivery]
    unreadable: Sequence[tuple[Delivery, str]]
    due: float | None
    """Seconds until the next delayed message."""
    restore: float | None
    """Seconds until something may have to be restored."""

    @property
    def tokens(self) -> frozenset[Token]:
        return frozenset(delivery.token for delivery in self.deliveries)


class Claimer:
    """The consumers of one transport."""

    def __init__(
        self, session: Session, calls: Calls, layout: Layout, options: TransportOptions, clock: Clock, bury: Any
    ) -> None:
        """``bury``: a coroutine function that settles to the dead letters what cannot be read."""
        self._session, self._calls, self._layout, self._options = session, calls, layout, options
        self._clock = clock
        self._bury = bury
        self._watches: set[Watch] = set()
        self._claiming: set[asyncio.Future[_Answer]] = set()
        self._cleaning: set[asyncio.Task[None]] = set()
        self._unyielded: set[Token] = set()
        """Claimed, and not yet on its way to the caller."""

    # --- the loop ---

    async def consume(
        self, queues: Sequence[str], *, credit: Credit, lease: float
    ) -> AsyncIterator[Sequence[Delivery]]:
        """See the port."""
        names = list(dict.fromkeys(queues))
        watch = Watch(self._session, self._request(names, 0, 0).watched)
        self._watches.add(watch)
        try:
            await self._calls.run(watch.open, self._options.socket_timeout)
            yielded = time.monotonic()
            turn = 0
            while True:
                patience = yielded + _LONGEST_SILENCE - time.monotonic()
                room = await self._room(credit, patience)
                answer = await self._claim(watch, self._request(names, turn, lease), room, credit)
                turn += 1
                if answer.deliveries or time.monotonic() - yielded >= _LONGEST_SILENCE:
                    yield answer.deliveries
                    yielded = time.monotonic()
                for delivery, cause in answer.unreadable:
                    await self._bury(delivery, cause)
                if answer.restore is not None and answer.restore <= 0:
                    await self._calls.run(self._restore, self._options.socket_timeout)
                if room and not answer.deliveries:
                    pause = self._pause(answer, yielded)
                    await self._calls.run(partial(watch.wait, pause), pause + self._options.socket_timeout)
        finally:
            self._watches.discard(watch)
            await watch.close()

    def _pause(self, answer: _Answer, yielded: float) -> float:
        waits = [self._options.poll_interval, yielded + _LONGEST_SILENCE - time.monotonic()]
        waits += [max(wait, _SHORTEST_PAUSE) for wait in (answer.due, answer.restore) if wait is not None]
        return max(0.0, min(waits))

    def _request(self, names: Sequence[str], turn: int, lease: float) -> Request:
        """Another queue comes first each time, so that a full one does not starve the others of its step."""
        at = turn % len(names) if names else 0
        turned = [*names[at:], *names[:at]]
        delayed = [self._layout.delayed(queue) for queue in turned]
        plain = [self._layout.list_of(queue, 0) for queue in turned]
        lists = self._layout.lists(turned)
        keys = [*self._layout.common, *delayed, *plain, *lists]
        return Request(queues=turned, keys=keys, watched=[*delayed, *lists], lease=lease)

    async def _room(self, credit: Credit, patience: float) -> int:
        """How many deliveries may be claimed; 0 if no credit comes for as long as the caller may be kept waiting."""
        if not credit.available:
            await self._calls.run(lambda: _paid(credit, patience), patience + self._options.socket_timeout)
        return min(credit.available, _LARGEST_BATCH)

    async def _restore(self) -> None:
        await restore_overdue(self._session, self._layout, self._options.visibility_timeout)

    # --- one claim ---

    async def _claim(self, watch: Watch, request: Request, room: int, credit: Credit) -> _Answer:
        """Claim, with the credit taken beforehand: several consumers may share it.

        What is claimed for a caller who is gone by then is given back, uncounted.
        """
        if self._calls.closed:
            raise self._calls.ended()
        claimed = asyncio.ensure_future(self._ask(watch, request, room))
        self._claiming.add(claimed)
        claimed.add_done_callback(self._claiming.discard)
        credit.take(room)
        unused = room
        try:
            answer = await asyncio.shield(claimed)
            if self._calls.closed:
                raise self._calls.ended()
            unused -= len(answer.deliveries)
            self._unyielded -= answer.tokens
            return answer
        except asyncio.CancelledError:
            await asyncio.shield(self._clean(claimed))
            raise
        finally:
            if unused:
                credit.give(unused)

    async def _ask(self, watch: Watch, request: Request, room: int) -> _Answer:
        claim = uuid4().hex
        until = self._clock.time() + request.lease
        options = self._options
        numbers = (claim, room, request.lease, options.visibility_timeout, envelope.SEPARATOR, len(request.queues))
        try:
            async with asyncio.timeout(options.socket_timeout):
                found = await watch.claim(request.keys, (*numbers, *request.queues))
        except FAULTS as exc:
            raise self._session.failure(exc) from exc
        taken = [self._taken(found[at : at + 5], claim, until) for at in range(2, len(found), 5)]
        answer = _Answer(
            deliveries=[delivery for delivery, cause in taken if not cause],
            unreadable=[(delivery, cause) for delivery, cause in taken if cause],
            due=float(found[0]) if found[0] else None,
            restore=float(found[1]) if found[1] else None,
        )
        self._unyielded |= answer.tokens
        return answer

    def _taken(self, found: Sequence[Any], claim: str, until: float) -> tuple[Delivery, str]:
        """One delivery, and why it cannot be read, if so."""
        tag, name, count, starts, raw = found
        queue, cause = name.decode(), ""
        try:
            message, number = envelope.read(raw, queue)
            message = evolve(message, priority=self._layout.on_wire(number))
        except envelope.Unreadable as exc:
            message, cause = Message(queue=queue, body=raw, content_type="text/plain"), f"unreadable: {exc}"
        delivery = Delivery(
            message=message,
            queue=queue,
            token=Token(tag, claim),
            count=int(count),
            starts=int(starts),
            leased_until=until,
        )
        return delivery, cause

    # --- giving back ---

    def _clean(self, claimed: asyncio.Future[_Answer]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._abandon(claimed))
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)
        return task

    async def _abandon(self, claimed: asyncio.Future[_Answer]) -> None:
        await asyncio.wait([claimed])
        if claimed.exception() is None:
            await self._give_back(claimed.result().tokens)

    async def _give_back(self, tokens: frozenset[Token]) -> None:
        self._unyielded -= tokens
        if not tokens:
            return
        args = [part for token in tokens for part in (token.tag, token.claim, "requeue", 0, 0, "")]
        try:
            async with asyncio.timeout(1.0):
                await self._session.run(scripts.SETTLE, self.settle_keys, args)
        except FAULTS as exc:
            log.warning("%d messages were not given back and wait for their leases to end: %s", len(tokens), exc)

    @property
    def settle_keys(self) -> tuple[str, ...]:
        """The keys of the script that settles."""
        return (*self._layout.common, self._layout.queues, self._layout.delayed_prefix)

    async def close(self) -> None:
        """Give back, uncounted, what was claimed and not yielded; disconnect the consumers."""
        if pending := self._claiming | self._cleaning:
            await asyncio.wait(pending)
        await self._give_back(frozenset(self._unyielded))
        for watch in tuple(self._watches):
            await watch.close()


async def _paid(credit: Credit, patience: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, patience)):
            await credit.wait()
