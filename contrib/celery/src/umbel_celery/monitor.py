"""The thread that speaks to Celery's tools: its own connection, its own life; the worker never waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import kombu
from kombu import clocks, pidbox

from umbel_celery import events
from umbel_celery.address import Address
from umbel_celery.commands import handlers
from umbel_celery.events import SOFTWARE, Event
from umbel_celery.options import CeleryOptions

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

log = logging.getLogger("umbel.celery")

_kombu: Any = kombu  # it has no types, and lists its names in a way that type checkers do not read
_pidbox: Any = pidbox

_TICK: Final = 0.2
"""Seconds that task events wait for company, and that the end of the worker may wait for the thread."""
_LARGEST_BATCH: Final = 500
_KEPT: Final = 20_000
"""Events kept while the broker cannot be reached; the oldest are dropped first."""
_PAUSE: Final = (0.5, 30.0)
"""First and longest pause in seconds before a lost connection is built again."""
_ANSWERS: Final = 3.0
"""Seconds for which other workers may answer what they know of revocations."""
_PATIENCE: Final = 5.0
"""Seconds that a command waits for the worker's I/O loop."""


class Deaf(ConnectionError):
    """The connection takes what is said, but brings nothing."""


class Ending(RuntimeError):
    """The worker's loop waits for this thread now, and answers nothing any more."""


class Monitor(threading.Thread):
    """Answers remote control and sends events, for ever, through whatever befalls its connection."""

    def __init__(self, worker: Worker, address: Address, options: CeleryOptions) -> None:
        super().__init__(name="umbel-celery", daemon=True)
        self._worker, self._address, self._options = worker, address, options
        self._loop = asyncio.get_running_loop()
        self._ending = threading.Event()
        self._ends_at: float | None = None
        self._outbox: deque[Event] = deque(maxlen=_KEPT)
        self._unsent: list[Event] = []
        """Taken from the outbox, and not yet accepted by the broker."""
        self._lamport = clocks.LamportClock()
        self._session: _Session | None = None
        self.events = options.events

    # --- called on the worker's I/O loop ---

    def say(self, event: Event) -> None:
        """Send a task event soon, if anybody wants them."""
        if self.events:
            self._outbox.append(event)

    def end_within(self, seconds: float) -> None:
        """End at that time even if nobody calls ``end``."""
        self._ends_at = time.monotonic() + seconds

    def end(self) -> None:
        """Say farewell and end. Does not wait."""
        self._ending.set()

    # --- called on the thread ---

    def on_loop(self, work: Callable[[], Any]) -> Any:
        """See ``commands.Control``. Raises what ``work`` raises, ``Ending``, ``TimeoutError``."""

        async def run() -> Any:
            made = work()
            return await made if isawaitable(made) else made

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        deadline = time.monotonic() + _PATIENCE
        while not wait([future], timeout=_TICK).done:
            if self._ending.is_set():
                future.cancel()
                raise Ending("the worker is at its end")
            if time.monotonic() > deadline:
                future.cancel()
                raise TimeoutError(f"the worker has not answered within {_PATIENCE:g} s")
        return future.result()

    def clock(self) -> int:
        return int(self._lamport.value)

    def broker(self) -> Mapping[str, Any]:
        return {} if self._session is None else self._session.broker()

    def beat(self, freq: float | None = None) -> None:
        if self._session is not None:
            self._session.beat("worker-heartbeat", freq)

    def run(self) -> None:
        pause = _PAUSE[0]
        while not self.over():
            begun = time.monotonic()
            try:
                with contextlib.closing(
                    _Session(self, self._worker, self._address, self._options, self._lamport)
                ) as session:
                    self._session = session
                    session.serve()
            except Exception as exc:  # kombu passes on what its client libraries raise, and the worker must not notice
                if self.over():
                    return
                if time.monotonic() - begun > _PAUSE[1]:
                    pause = _PAUSE[0]
                log.warning(
                    "Celery's tools cannot see this worker, trying again in %.1f s: %s",
                    pause,
                    exc or type(exc).__name__,
                )
                self._ending.wait(pause * random.uniform(0.5, 1))  # jitter, not a secret
                pause = min(pause * 2, _PAUSE[1])
            finally:
                self._session = None

    def unsent(self) -> list[Event]:
        """The next events to send; whoever has sent them clears the list."""
        while self._outbox and len(self._unsent) < _LARGEST_BATCH:
            self._unsent.append(self._outbox.popleft())
        return self._unsent

    def over(self) -> bool:
        """Whether it is time to end."""
        return self._ending.is_set() or (self._ends_at is not None and time.monotonic() > self._ends_at)


class _Session:
    """One connection with all that lives on it."""

    def __init__(
        self, monitor: Monitor, worker: Worker, address: Address, options: CeleryOptions, lamport: clocks.LamportClock
    ) -> None:
        self._monitor, self._worker, self._options, self._lamport = monitor, worker, options, lamport
        self._connection = _kombu.Connection(
            address.url,
            heartbeat=30 if address.amqp else 0,
            connect_timeout=5,
            ssl=dict(address.ssl) or None,
            transport_options=dict(address.transport_options),
        )
        kind = "topic" if address.amqp else "fanout"
        self._exchange = _kombu.Exchange(options.event_exchange, kind, durable=True)
        self._producer: Any = None
        self._heard = time.monotonic()
        self._last_figures: dict[str, Any] = {}
        self._asking: tuple[Any, float] | None = None
        """The consumer of what other workers answer, and until when it listens."""

    # --- life ---

    def serve(self) -> None:
        """Connect, and answer until the monitor is over. Raises what kombu raises."""
        self._connection.connect()
        self._producer = _kombu.Producer(self._connection.channel(), exchange=self._exchange, serializer="json")
        mailbox = _pidbox.Mailbox(
            self._options.control_exchange,
            type="fanout",
            connection=self._connection,
            clock=self._lamport,
            queue_ttl=300.0,
            queue_expires=10.0,
        )
        channel = self._connection.channel()
        node = mailbox.Node(self._worker.name, None, channel, dict(handlers(self._worker, self._monitor)))
        heard = self._hearing(node.handle_message)
        with contextlib.ExitStack() as stack:
            stack.enter_context(node.Consumer(channel, callbacks=[heard], on_decode_error=_unreadable))
            if self._options.gossip:
                stack.enter_context(self._gossip())
                self._mingle(mailbox)
            self._drain()  # on Redis, only what drains subscribes: whoever hears of us is to be heard
            self.beat("worker-online")
            log.info("Celery's tools can see this worker")
            self._answer()
            self.beat("worker-offline")

    def _answer(self) -> None:
        next_beat = 0.0
        while not self._monitor.over():
            if (now := time.monotonic()) >= next_beat:
                self._check_ears(now)
                self.beat("worker-heartbeat")
                next_beat = now + self._options.heartbeat
                if self._asking is not None and now > self._asking[1]:
                    self._asking[0].cancel()
                    self._asking = None
            self._drain()
            if self._connection.heartbeat:
                self._connection.heartbeat_check()
            self._flush()
        self._flush()

    def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            self._connection.drain_events(timeout=_TICK)

    def close(self) -> None:
        """Disconnect."""
        with contextlib.suppress(Exception):  # it may be broken in any way, and is thrown away
            self._connection.release()

    # --- hearing ---

    def _hearing(self, answer: Callable[..., Any]) -> Callable[[Any, Any], None]:
        """A callback that survives whatever a message makes of ``answer``, but not a fault of the connection."""
        faults = (*self._connection.connection_errors, *self._connection.channel_errors)

        def hear(body: Any, message: Any) -> None:
            self._heard = time.monotonic()
            try:
                answer(body, message)
            except faults:
                raise
            except Exception:
                log.exception("a message of Celery's remote control cannot be answered and is ignored")

        return hear

    def _gossip(self) -> Any:
        queue = _kombu.Queue(
            f"{self._options.event_exchange}.{uuid4()}",
            self._exchange,
            "worker.#",
            durable=False,
            auto_delete=True,
            exclusive=True,
            expires=60.0,
            message_ttl=5.0,
        )
        return self._consumer(queue, self._heed)

    def _consumer(self, queue: Any, answer: Callable[..., Any]) -> Any:
        heard = self._hearing(answer)
        return _kombu.Consumer(
            self._connection.channel(),
            [queue],
            no_ack=True,
            accept=["json"],
            callbacks=[heard],
            on_decode_error=_unreadable,
        )

    def _heed(self, body: Any, message: Any) -> None:
        """Whoever counts as alive must acknowledge every candidate, or no election ends."""
        self._lamport.adjust(int(body.get("clock") or 0))
        if body.get("type") == "worker-elect":
            self._publish([Event("worker-elect-ack", {"id": body.get("id")}, time.time())], "worker.elect.ack")

    def _mingle(self, mailbox: Any) -> None:
        """Ask the other workers what is revoked, and tell them; nobody is waited for."""
        with contextlib.suppress(Ending):
            revoked = self._monitor.on_loop(lambda: list(self._worker.operations.revoked))
            consumer = self._consumer(mailbox.reply_queue, self._learn)
            consumer.consume()
            self._asking = consumer, time.monotonic() + _ANSWERS
            request = {
                "method": "hello",
                "arguments": {"from_node": self._worker.name, "revoked": revoked},
                "destination": None,
                "ticket": str(uuid4()),
                "reply_to": {"exchange": mailbox.reply_exchange.name, "routing_key": mailbox.oid},
            }
            headers = {"clock": self._lamport.forward(), "expires": time.time() + _ANSWERS}
            exchange = mailbox.exchange
            self._producer.publish(request, exchange=exchange, declare=[exchange], headers=headers, retry=False)

    def _learn(self, body: Any, message: Any) -> None:
        ids: list[str] = []
        for told in body.values():
            if isinstance(told, dict) and "clock" in told:
                self._lamport.adjust(int(told["clock"] or 0))
                ids += map(str, told.get("revoked") or ())
        if ids:
            with contextlib.suppress(Ending):
                self._monitor.on_loop(lambda: self._worker.operations.revoke(ids))

    def _check_ears(self, now: float) -> None:
        """Our own heartbeats come back to us: where they do not, requests would not either."""
        longest = max(10 * self._options.heartbeat, 20.0)
        if self._options.gossip and now - self._heard > longest:
            raise Deaf(f"nothing was heard for {longest:g} s")

    # --- saying ---

    def beat(self, kind: str, freq: float | None = None) -> None:
        """Say that the worker lives. With ``freq``, without figures, as for a command."""
        fields: dict[str, Any] = {"freq": self._options.heartbeat if freq is None else freq, **SOFTWARE}
        if freq is None:
            with contextlib.suppress(Ending):  # then the last ones will do
                self._last_figures = self._monitor.on_loop(self._figures)
            fields |= self._last_figures
        self._publish([Event(kind, fields, time.time())], kind.replace("-", "."))

    def _figures(self) -> dict[str, Any]:
        operations = self._worker.operations
        return {
            "active": len(operations.active()),
            "processed": sum(operations.stats()["total"].values()),
            "loadavg": [round(load, 2) for load in os.getloadavg()],
        }

    def _flush(self) -> None:
        while batch := self._monitor.unsent():
            self._publish(batch, "task.multi", many=True)
            batch.clear()

    def _publish(self, batch: list[Event], routing_key: str, *, many: bool = False) -> None:
        assert self._producer is not None
        made = [events.on_wire(event, hostname=self._worker.name, clock=self._lamport.forward()) for event in batch]
        self._producer.publish(
            made if many else made[0],
            routing_key=routing_key,
            headers={"hostname": self._worker.name},
            delivery_mode=1,
            retry=False,
        )

    def broker(self) -> Mapping[str, Any]:
        """The connection as Celery shows it, without what may be secret."""
        info = {**self._connection.info(), "alternates": [], "transport_options": {}}
        info.pop("password", None)
        plain = (str, int, float, bool, type(None), list, dict)
        return {name: value if isinstance(value, plain) else str(value) for name, value in info.items()}


def _unreadable(message: Any, exc: Exception) -> None:
    log.warning("a message of Celery's remote control cannot be read and is ignored: %s", exc)
