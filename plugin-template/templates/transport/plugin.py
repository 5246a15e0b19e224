"""``{{ cookiecutter.name }}:///folder``: a broker that is a folder, for any number of processes that see it.

A message is one file. The file's *name* is the message's whole state, and each step of its life is one atomic rename:
of several who try the same step one wins, and the others find no such file. So there are no locks, and a crash leaves
nothing to repair. Names begin with what orders messages: a sorted listing is the order of handing out.
"""

from __future__ import annotations

import asyncio
import errno
import heapq
import json
import os
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit
from uuid import uuid4

from attrs import define, frozen

from umbel.capabilities import UNLIMITED, TransportCapabilities
from umbel.errors import BrokerUnavailable, PublishRefused, SettingsError
from umbel.model import (
    HEADER_DEAD_AT,
    HEADER_DEAD_CAUSE,
    HEADER_DEAD_COUNT,
    HEADER_DEAD_QUEUE,
    Action,
    Delivery,
    Message,
    QueueSpec,
    Settlement,
    dead_letter_queue,
)
from umbel.ports.clock import Clock
from umbel.ports.transport import Credit, QueueDepth, Transport

T = TypeVar("T")

QUIET: Final = 4.0
"""Seconds after which an empty batch is yielded; the port asks for one every 5 s."""
REFUSALS: Final = frozenset({errno.EACCES, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM, errno.EROFS})
"""Errors of the file system that no other try will mend by itself."""
SCHEME: Final = "{{ cookiecutter.name }}"
BYTES: Final = f"{SCHEME}:bytes"
"""The one key of the object that stands for bytes, which JSON lacks, in headers and properties."""


@frozen
class Options:
    """Options of the transport."""

    poll: float = 0.05
    """Seconds between two looks at a folder in which there was nothing."""


class State(NamedTuple):
    """The name of a message's file. Times are microseconds."""

    rank: int
    """9 less the priority."""
    place: int
    """When it was accepted, or became due; kept for good, so that what comes back comes back to the front."""
    tick: int
    """Tells apart and orders what was accepted at once."""
    sender: str
    until: int = 0
    """Away until then: delayed, or leased; 0: ready."""
    leased: int = 0
    deliveries: int = 0
    starts: int = 0
    fence: int = 0
    """Grows with each handing-out and each return, so that no two steps of one message make the same name."""
    grave: int = 0
    """The fence of the step that made it a dead letter; 0: none did."""

    def __str__(self) -> str:
        rank, place, tick, *rest = self
        return "-".join([str(rank), f"{place:017}", f"{tick:020}", *map(str, rest)])

    @classmethod
    def parse(cls, name: str) -> State:
        rank, place, tick, sender, *rest = name.split("-")
        return cls(int(rank), int(place), int(tick), sender, *map(int, rest))


@define(eq=False)
class Token:
    """The handle of one handing-out: which file it is now. Renewing changes the name, and so the token."""

    queue: str
    state: State


class {{ cookiecutter.__class }}(Transport):
    """Keeps messages in the folder that the URL names: three slashes before a relative path, four before an absolute one.

    File operations run in the one thread of each instance, in the order of the calls; consumers look every
    ``Options.poll`` seconds. A delivery whose lease has ended can be settled or renewed until it is handed out again.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type] = Options
    capabilities: TransportCapabilities = TransportCapabilities(
        durable=True,
        confirm=True,
        max_delay=UNLIMITED,
        priority_levels=10,
        renewable_lease=True,
        delivery_count=True,
        start_marks=True,
    )

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        parts = urlsplit(url)
        if parts.netloc or len(parts.path) < 2:
            raise SettingsError([f"[broker] url must be {SCHEME}:///folder, or {SCHEME}:////absolute/folder"])
        self._folder = Path(unquote(parts.path[1:])).absolute()
        self._sender = uuid4().hex[:12]
        self._tick = 0
        self._claimed: set[Token] = set()
        """Not yielded yet."""
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"umbel-{SCHEME}")

    # --- the port, on the event loop ------------------------------------------------------------

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._do(self._publish, messages)
        except TimeoutError:
            raise BrokerUnavailable(f"{self._folder} has not taken the messages within {timeout:g} s") from None

    async def consume(
        self, queues: Sequence[str], *, credit: Credit, lease: float
    ) -> AsyncIterator[Sequence[Delivery]]:
        loop, names = asyncio.get_running_loop(), tuple(dict.fromkeys(queues))
        quiet_until = loop.time() + QUIET
        while True:
            batch = await self._do(self._claim, names, credit.available, lease, undo=self._unclaim)
            if self._closed:  # which has given back what was claimed
                raise BrokerUnavailable(f"this connection to {self._folder} was closed")
            if batch or loop.time() >= quiet_until:
                credit.take(len(batch))
                self._claimed.difference_update(delivery.token for delivery in batch)
                yield batch
                quiet_until = loop.time() + QUIET
                continue
            try:
                async with asyncio.timeout(self.options.poll):
                    await (asyncio.sleep(self.options.poll) if credit.available else credit.wait())
            except TimeoutError:
                pass  # time for another look

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return await self._do(lambda: [self._settle(settlement) for settlement in settlements])

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        return await self._do(lambda: [self._renew(delivery.token, lease, starting) for delivery in deliveries])

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        """See the port. A folder has no kinds, arguments or exchanges: a queue that asks for some is refused."""
        for spec in queues:
            for name, value in (("type", spec.type), ("arguments", spec.arguments), ("exchange", spec.exchange)):
                if value:
                    raise PublishRefused(f"queue {spec.name!r} is a folder and has no {name}: remove {value!r}")
            await self._do(lambda queue=spec.name: self._place(queue).mkdir(parents=True, exist_ok=True))

    async def purge(self, queue: str) -> int:
        return await self._do(lambda: sum(self._removed(queue, state) for state in self._waiting(queue)))

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        return await self._do(lambda: {queue: self._depth(queue) for queue in queues or self._queues()})

    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        """Ready messages in the order of handing out, then delayed ones by due time."""
        return await self._do(self._peek, queue, limit, offset)

    async def close(self) -> None:
        """Give back what was claimed and not yielded; iterators raise ``BrokerUnavailable`` at their next look."""
        if self._closed:
            return
        self._closed = True
        await asyncio.wrap_future(self._thread.submit(lambda: [self._uncount(token) for token in [*self._claimed]]))
        self._thread.shutdown()  # nothing is left for it to do

    async def _do(self, function: Callable[..., T], *arguments: Any, undo: Callable[..., object] | None = None) -> T:
        """Run ``function`` in the thread. Raises ``BrokerUnavailable`` for what the file system refuses, and after ``close``.

        If the call is cancelled the thread may be at it all the same, and runs ``undo`` next.
        """
        if self._closed:
            raise BrokerUnavailable(f"this connection to {self._folder} is closed; make a new instance")
        future = self._thread.submit(function, *arguments)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if undo is not None and not self._closed:
                self._thread.submit(undo, future)
            raise
        except OSError as error:
            raise BrokerUnavailable(f"{self._folder}: {error}") from error

    # --- in the thread: files -------------------------------------------------------------------

    def _place(self, queue: str) -> Path:
        return self._folder / f"queue-{quote(queue, safe='')}"

    def _queues(self) -> list[str]:
        return [unquote(path.name.removeprefix("queue-")) for path in sorted(self._folder.glob("queue-*"))]

    def _states(self, queue: str) -> Iterator[State]:
        """In the order of handing out, which is that of the names."""
        try:
            names = os.listdir(self._place(queue))
        except FileNotFoundError:
            return iter(())
        return map(State.parse, sorted(names))

    def _now(self) -> int:
        return int(self.clock.time() * 1_000_000)

    def _renamed(self, queue: str, state: State, to: str, new: State) -> bool:
        """Take one step of a message's life; False if another has been quicker."""
        try:
            os.rename(self._place(queue) / str(state), self._place(to) / str(new))
        except FileNotFoundError:
            return False
        return True

    def _removed(self, queue: str, state: State) -> bool:
        try:
            os.unlink(self._place(queue) / str(state))
        except FileNotFoundError:
            return False
        return True

    def _read(self, queue: str, state: State) -> Message:
        """A file is a line of JSON, then the body, then a line for each time that it was to become a dead letter."""
        head, _, rest = (self._place(queue) / str(state)).read_bytes().partition(b"\n")
        fields = json.loads(head, object_hook=_restore)
        size = fields.pop("size")
        for line in rest[size:].splitlines():
            letter = json.loads(line)
            if letter.pop("fence") == state.grave:
                fields["headers"].update(letter)
        return Message(queue=queue, body=rest[:size], **fields)

    # --- in the thread: messages ----------------------------------------------------------------

    def _publish(self, messages: Sequence[Message]) -> None:
        try:
            for draft, final in [self._write(message) for message in messages]:
                os.rename(draft, final)
        except OSError as error:
            for draft in (self._folder / "drafts").glob(f"*-{self._sender}-*"):
                draft.unlink(missing_ok=True)
            kind = PublishRefused if error.errno in REFUSALS else BrokerUnavailable
            raise kind(f"{self._folder} does not take the message: {error}") from error

    def _write(self, message: Message) -> tuple[Path, Path]:
        """Write the file where nobody looks; where it is, and where it belongs."""
        fields = {name: getattr(message, name) for name in ("content_type", "content_encoding", "priority", "due")}
        fields |= {"headers": dict(message.headers), "properties": dict(message.properties), "size": len(message.body)}
        try:
            head = json.dumps(fields, default=_plain).encode()
        except (TypeError, ValueError) as error:
            told = f"message {message.id or '(no id)'} for queue {message.queue!r}"
            raise PublishRefused(f"{told}: headers and properties must be plain data: {error}") from None
        self._tick = max(self._tick + 1, time.time_ns())
        now, due = self._now(), 0 if message.due is None else -int(-message.due * 1_000_000)
        rank = 9 - min(max(message.priority, 0), 9)
        state = State(rank, max(now, due), self._tick, self._sender, until=due if due > now else 0)
        final = self._place(message.queue) / str(state)
        draft = self._folder / "drafts" / str(state)
        for folder in (final.parent, draft.parent):
            folder.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(head + b"\n" + message.body)
        return draft, final

    def _claim(self, queues: Sequence[str], room: int, lease: float) -> list[Delivery]:
        now = self._now()
        batch: list[Delivery] = []
        for state, queue in heapq.merge(*(zip(self._states(queue), repeat(queue)) for queue in queues)):
            if len(batch) >= room or self._closed:
                break
            if state.until > now:
                continue
            until, number, fence = now + int(lease * 1_000_000), state.deliveries + 1, state.fence + 1
            new = state._replace(until=until, leased=1, deliveries=number, fence=fence)
            if self._renamed(queue, state, queue, new):
                batch.append(self._delivery(queue, new))
        return batch

    def _delivery(self, queue: str, state: State) -> Delivery:
        token = Token(queue, state)
        self._claimed.add(token)
        return Delivery(
            message=self._read(queue, state),
            queue=queue,
            token=token,
            count=state.deliveries,
            starts=state.starts,
            leased_until=state.until / 1_000_000,
        )

    def _unclaim(self, claim: Future[list[Delivery]]) -> None:
        """Claimed and yielded are one thing: give back, uncounted, what nobody has been told of."""
        if not claim.cancelled() and claim.exception() is None:
            for delivery in claim.result():
                self._uncount(delivery.token)

    def _uncount(self, token: Token) -> bool:
        self._claimed.discard(token)
        return self._give_back(token, counted=False)

    def _settle(self, settlement: Settlement) -> bool:
        token: Token = settlement.delivery.token
        match settlement.action:
            case Action.ACK:
                return self._removed(token.queue, token.state)
            case Action.REQUEUE:
                return self._give_back(token, counted=settlement.counted, delay=settlement.delay)
            case Action.DEAD:
                return self._bury(token, settlement.cause)

    def _give_back(self, token: Token, *, counted: bool, delay: float = 0.0) -> bool:
        old = token.state
        until = self._now() + int(delay * 1_000_000) if delay > 0 else 0
        new = old._replace(until=until, leased=0, deliveries=old.deliveries - (not counted), fence=old.fence + 1)
        return self._renamed(token.queue, old, token.queue, new)

    def _bury(self, token: Token, cause: str) -> bool:
        """Move a message to the dead letters: the headers are written behind its body, then one rename makes them count."""
        now, old, queue = self._now(), token.state, dead_letter_queue(token.queue)
        fence = old.fence + 1
        new = old._replace(place=now, until=0, leased=0, deliveries=0, starts=0, fence=fence, grave=fence)
        letter = {
            "fence": fence,
            HEADER_DEAD_CAUSE: cause,
            HEADER_DEAD_QUEUE: token.queue,
            HEADER_DEAD_AT: now / 1_000_000,
            HEADER_DEAD_COUNT: old.deliveries,
        }
        self._place(queue).mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(self._place(token.queue) / str(old), os.O_WRONLY | os.O_APPEND)
        except FileNotFoundError:
            return False
        with open(file, "ab") as behind:
            behind.write(json.dumps(letter).encode() + b"\n")
        return self._renamed(token.queue, old, queue, new)

    def _renew(self, token: Token, lease: float, starting: bool) -> bool:
        until = self._now() + int(lease * 1_000_000)
        new = token.state._replace(until=until, starts=token.state.starts + starting)
        if not self._renamed(token.queue, token.state, token.queue, new):
            return False
        token.state = new
        return True

    def _waiting(self, queue: str) -> list[State]:
        """Messages that nobody holds: ready in the order of handing out, then delayed by due time."""
        now = self._now()
        states = [state for state in self._states(queue) if not (state.leased and state.until > now)]
        return sorted(states, key=lambda state: (max(state.until, now), state))

    def _peek(self, queue: str, limit: int, offset: int) -> list[Message]:
        found = []
        for state in self._waiting(queue)[offset : offset + limit]:
            try:
                found.append(self._read(queue, state))
            except FileNotFoundError:
                pass  # handed out since
        return found

    def _depth(self, queue: str) -> QueueDepth:
        now, states = self._now(), list(self._states(queue))
        ready = [state for state in states if state.until <= now]
        leased = sum(state.leased for state in states if state.until > now)
        oldest = min((state.place / 1_000_000 for state in ready), default=None)
        return QueueDepth(ready=len(ready), delayed=len(states) - len(ready) - leased, leased=leased, oldest=oldest)


def _plain(value: object) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} is not plain data")
    return {BYTES: b64encode(value).decode()}


def _restore(members: dict[str, Any]) -> Any:
    return b64decode(members[BYTES]) if members.keys() == {BYTES} else members
