"""The transport port: moving messages through a broker, in batches, under leases.

Lifecycle: a driver is constructed without any I/O, connects on its first call, and is bound to the event loop of
that call. ``close`` ends it. All methods are coroutines on that one loop, may run concurrently with each other, and
never block the loop: a driver for a blocking library runs its calls in threads of its own.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar

from attrs import frozen

from umbel.capabilities import TransportCapabilities
from umbel.model import Delivery, Message, QueueSpec, Settlement
from umbel.ports.clock import Clock, SystemClock
from umbel.ports.options import NoOptions


class Credit:
    """How many deliveries a consumer may still be handed. Lives on one event loop; not thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """The most that may be out at once."""
        self.out = 0
        """Handed out and not yet settled."""
        self._changed = asyncio.Event()

    @property
    def available(self) -> int:
        """How many may be handed out now."""
        return max(0, self.limit - self.out)

    def take(self, number: int) -> None:
        """The driver hands out ``number`` deliveries."""
        self.out += number

    def give(self, number: int) -> None:
        """The worker has settled ``number`` deliveries."""
        self.out -= number
        self._changed.set()

    def resize(self, limit: int) -> None:
        """Change the limit; deliveries already out stay out."""
        self.limit = limit
        self._changed.set()

    async def wait(self) -> int:
        """Wait until at least one delivery may be handed out; return how many may be."""
        while self.limit <= self.out:
            self._changed.clear()
            await self._changed.wait()
        return self.limit - self.out


class Transport(ABC):
    """A broker. Publishes, hands out under leases, settles."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type] = NoOptions
    """attrs class of the driver's own settings, ``[broker.options]`` and the URL's query."""

    capabilities: TransportCapabilities
    """What this broker keeps; may depend on the URL and the options, not on the connection."""

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        """Remember the address. No I/O. ``options`` is an instance of ``Options``; None: the defaults."""
        self.url = url
        self.options = self.Options() if options is None else options
        self.clock: Clock = SystemClock() if clock is None else clock

    @abstractmethod
    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        """Hand ``messages`` to the broker; return when it has *accepted* every one.

        A queue that does not exist is created with the driver's defaults. The whole call, connecting included, ends
        within ``timeout`` seconds. Either all are accepted or an error is raised; after an error some may have been.
        A message whose ``due`` lies ahead is not handed out before that time. With ``exchanges``, a message whose properties
        name an ``exchange`` goes there and not to ``queue``; one that is bound to no queue then is refused.

        Raises ``BrokerUnavailable`` (not reachable, or the deadline passed), ``PublishRefused`` (the broker said no),
        ``NotSupported`` (a delay beyond ``max_delay``).
        """

    @abstractmethod
    def consume(self, queues: Sequence[str], *, credit: Credit, lease: float) -> AsyncIterator[Sequence[Delivery]]:
        """Hand out messages of ``queues`` in batches, never more than ``credit`` allows, each leased for ``lease`` s.

        Higher priorities first, then oldest first. Competing consumers never share a message while its lease holds.
        A message whose consumer dies or lets the lease run out is handed out again, to anybody, with its count raised.
        The driver calls ``credit.take``; the caller calls ``credit.give`` when it settles.

        Yields at least every 5 s, an *empty* batch if there was nothing: each yield says that the broker answered.
        Claimed and yielded are one thing: closing the iterator (``aclose``) gives back, uncounted, what was claimed and
        not yielded.

        Raises ``BrokerUnavailable`` when the session is lost; the caller throws the iterator away and starts anew.
        """

    @abstractmethod
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """End deliveries, in one round trip where the broker allows it.

        Returns, for each, whether it was carried out: False where the delivery was settled before, or its lease has
        passed to another (the fencing number differs). Settling to DEAD moves the message to
        ``dead_letter_queue(queue)`` in one atomic step, with the four ``umbel-dead-*`` headers added.

        Raises ``BrokerUnavailable``; then nothing is known, and the call may be repeated.
        """

    @abstractmethod
    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        """Extend the leases to ``lease`` seconds from now; with ``starting``, first record that work on them begins.

        Returns, for each, whether it is still held. Without ``renewable_lease``: True for all, while the session lives.
        Raises ``BrokerUnavailable``.
        """

    @abstractmethod
    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        """Make sure that ``queues`` exist as described, with ``exchanges`` also their exchanges and bindings.

        A binding is added to those that a queue has; none is taken away. The kernel declares, once a session and before
        their first use, the queues that it consumes and those that the settings describe.

        Raises ``PublishRefused`` naming the argument where an existing queue or exchange differs, or where this broker has
        no such thing; ``BrokerUnavailable``.
        """

    @abstractmethod
    async def purge(self, queue: str) -> int:
        """Delete every message of ``queue`` that is not handed out, delayed ones included; return how many."""

    @abstractmethod
    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        """Count messages by queue; with no names given, of every queue that the broker can list."""

    @abstractmethod
    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        """Copies of waiting messages of ``queue``, without handing them out: ready ones in order, then delayed by due time."""

    @abstractmethod
    async def close(self) -> None:
        """Give back, uncounted, what was claimed and not yielded; free every resource. Harmless when called twice.

        Later calls raise ``BrokerUnavailable``. Where leases are renewable, what was yielded stays leased: another session
        may renew and settle it, so that a session that is thrown away does not make running work run twice.
        """


@frozen(kw_only=True)
class QueueDepth:
    """How many messages a queue holds."""

    ready: int = 0
    """Can be handed out now."""
    delayed: int = 0
    """Wait for their due time."""
    leased: int = 0
    """Handed out and not settled."""
    oldest: float | None = None
    """Unix time at which the oldest ready message was accepted or became due; None: unknown or none."""


class BlockingPublisher(ABC):
    """Ability ``blocking_publish``: synchronous callers publish without the detour over the I/O loop.

    The detour is two switches of thread each way, 150 to 200 µs a call on two cores, which is most of the cost of a small
    publish.
    """

    @abstractmethod
    def publish_blocking(self, messages: Sequence[Message], *, timeout: float) -> None:
        """``Transport.publish`` on the calling thread: same promises, same errors. Thread-safe."""


class Broadcaster(ABC):
    """Ability ``broadcast``: what is said reaches all who listen now, at most once, and is not kept."""

    @abstractmethod
    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        """Say ``payload`` to everybody subscribed to ``topic``. ``key`` is a routing key such as ``worker.heartbeat``."""

    @abstractmethod
    def subscribe(self, topic: str) -> AsyncIterator[tuple[str, bytes]]:
        """Hear ``(key, payload)`` of everything said to ``topic`` from the first ``__anext__`` on."""
