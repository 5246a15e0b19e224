"""Building and sending task messages."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Unpack

from umbel import limit_keys, protocol, unique
from umbel.canvas.graph import REST, riding
from umbel.canvas.signature import plain_signatures
from umbel.errors import EncodeError, UmbelError
from umbel.model import FINAL_STATES, Message, Result, State, TaskOptions
from umbel.protocol import NO_EMBED, Embed
from umbel.task import CallOptions, Request, current_request

if TYPE_CHECKING:
    from umbel.app import Umbel

logger = logging.getLogger("umbel.client")

_CALL_OPTIONS = frozenset(CallOptions.__annotations__) - unique.OPTIONS

_SMALL_BODY = 2048
"""Bytes below which plain ``repr`` of the arguments is quicker than a bounded one (2 µs against 15 µs)."""


class Client:
    """Turns calls into messages and hands them to the gateway. Thread-safe."""

    def __init__(self, app: Umbel) -> None:
        self._app = app
        self._origin = protocol.origin()
        self._reply_to: str | None = None
        self.tracks = bool(app.settings.results.url) and app.settings.results.track == "submit"
        """Whether a task has a record from its sending on."""
        self._before = app.plugins.observer("umbel_before_publish")
        self._after = app.plugins.observer("umbel_after_publish")

    def message(
        self,
        task: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: TaskOptions,
        **call: Unpack[CallOptions],
    ) -> Message:
        """The message of one call. Pure but for the clock and the id. Raises ``EncodeError``, ``TypeError``, ``ValueError``."""
        if not isinstance(args, Sequence) or isinstance(args, (str, bytes)):
            raise TypeError(f"the arguments of a task are a list or tuple, not {type(args).__name__}")
        if unknown := call.keys() - _CALL_OPTIONS:
            raise TypeError(f"a call has no option {', '.join(map(repr, sorted(unknown)))}; see umbel.task.CallOptions")
        now = self._app.clock.time()
        parent = current_request()
        eta = _due(call, now)
        expires = _moment(call.get("expires", options.expires), now)
        task_id = call.get("task_id") or protocol.new_id()
        embed = _embed(call)
        serializer = call.get("serializer") or options.serializer
        try:
            encoded = self._app.codec.encode(
                protocol.make_body(args, kwargs, embed),
                serializer=serializer,
                compression=call.get("compression") or options.compression,
            )
        except EncodeError as exc:
            raise EncodeError(f"task {task!r} cannot be sent: {exc}") from exc
        headers = protocol.make_headers(
            task,
            task_id,
            args=args,
            kwargs=kwargs,
            small=len(encoded.body) < _SMALL_BODY,
            eta=eta,
            expires=expires,
            retries=call.get("retries", 0),
            time_limit=call.get("time_limit", options.time_limit),
            soft_time_limit=call.get("soft_time_limit", options.soft_time_limit),
            root_id=call.get("root_id") or (parent.root_id if parent else None),
            parent_id=call.get("parent_id") or (parent.id if parent else None),
            group=call.get("group_id"),
            group_index=call.get("group_index"),
            shadow=call.get("shadow"),
            origin=call.get("origin") or self._origin,
            ignore_result=call.get("ignore_result", options.ignore_result),
            replaced_task_nesting=call.get("replaced_task_nesting", 0),
            stamped_headers=call.get("stamped_headers"),
            stamps=call.get("stamps"),
            argsrepr=call.get("argsrepr"),
            kwargsrepr=call.get("kwargsrepr"),
            headers=call.get("headers"),
        )
        if encoded.compression:
            headers["compression"] = encoded.compression
        if embed.chain:
            headers[REST] = riding(embed.chain)
        if options.concurrency_key or "key" in call:
            headers[limit_keys.HEADER] = limit_keys.of_call(self._app, task, args, kwargs, options, call.get("key"))
        priority = call.get("priority", options.priority) or 0
        if not 0 <= priority <= 9:
            raise ValueError(f"priority is 0 to 9, higher is sooner; {priority!r} is not")
        properties: dict[str, Any] = {
            "correlation_id": task_id,
            "reply_to": call.get("reply_to") or self._reply_to or self._own_reply_to(),
            "delivery_mode": 2,
        }
        if exchange := call.get("exchange"):
            properties |= {"exchange": exchange, "routing_key": call.get("routing_key") or ""}
        elif "routing_key" in call:
            raise ValueError("routing_key says nothing without exchange; to send to a queue, give queue")
        if expires is not None:
            properties["expiration"] = str(max(0, math.ceil((expires - now) * 1000)))
        return Message(
            queue=call.get("queue") or options.queue or self._app.settings.default_queue,
            headers=headers,
            body=encoded.body,
            content_type=encoded.content_type,
            content_encoding=encoded.content_encoding,
            priority=priority,
            due=eta,
            properties=properties,
        )

    def send(self, messages: Sequence[Message], timeout: float | None = None) -> None:
        """Publish; return when the broker has accepted every message. Raises ``PublishError`` within the deadline."""
        if not messages:
            return
        if self._before:
            self._before(messages=messages)
        self._app.gateway.publish(messages, self._deadline(timeout))
        if self.tracks:
            try:
                self._app.gateway.put(self.pending(messages))
            except UmbelError as exc:
                _untold(messages, exc)
        self._sent(messages)

    async def asend(self, messages: Sequence[Message], timeout: float | None = None) -> None:
        """``send`` for event loops."""
        if not messages:
            return
        if self._before:
            self._before(messages=messages)
        await self._app.gateway.apublish(messages, self._deadline(timeout))
        await self.note(messages)
        self._sent(messages)

    async def note(self, messages: Sequence[Message]) -> None:
        """Store the records of what is sent, where tasks have one from their sending on; a fault is logged."""
        if self.tracks:
            try:
                await self._app.gateway.aput(self.pending(messages))
            except UmbelError as exc:
                _untold(messages, exc)

    def put_state(self, request: Request, state: str, meta: Any) -> None:
        """Store a passing state of a running task."""
        if record := self._state_of(request, state, meta):
            self._app.gateway.put(record)

    async def aput_state(self, request: Request, state: str, meta: Any) -> None:
        """``put_state`` for event loops."""
        if record := self._state_of(request, state, meta):
            await self._app.gateway.aput(record)

    def _state_of(self, request: Request, state: str, meta: Any) -> list[Result]:
        if state in FINAL_STATES or state == State.UNKNOWN:
            raise ValueError(f"{state} is how a task ends: return, or raise; update_state tells what happens before")
        if request.called_directly or not self._app.settings.results.url:
            return []
        order = protocol.order_of(state, request.retries, request.delivery_count)
        return [self.state_record(request.id, state, meta, request.message.properties, order=order)]

    def pending(self, messages: Sequence[Message]) -> list[Result]:
        """The records of tasks whose messages the broker has accepted; they last until the tasks may end, and as long again
        as a result does. None for a task that is to have no result, and for what the sender cannot name."""
        now = self._app.clock.time()
        return [
            self.state_record(
                message.id,
                State.PENDING,
                None,
                message.properties,
                order=protocol.order_of(State.PENDING, message.headers.get("retries") or 0, 0),
                later=max(0.0, (message.due or now) - now),
            )
            for message in messages
            if message.id and not message.headers.get("ignore_result")
        ]

    def state_record(
        self,
        task_id: str,
        state: str,
        meta: Any,
        properties: Mapping[str, Any],
        *,
        order: int = 0,
        later: float = 0.0,
    ) -> Result:
        """The record of a passing state; ``properties`` of the task's message. It lasts ``later`` seconds longer than others.

        Raises ``EncodeError``.
        """
        encoded = self._app.result_codec.encode(protocol.result_document(task_id, state, meta))
        expires = self._app.settings.results.expires
        return Result(
            task_id=task_id,
            reply_to=properties.get("reply_to"),
            correlation_id=properties.get("correlation_id"),
            state=str(state),
            document=encoded.body,
            content_type=encoded.content_type,
            content_encoding=encoded.content_encoding,
            expires=None if expires is None else expires + later,
            order=order,
        )

    def _own_reply_to(self) -> str:
        """Not before the first message: in a fork server there is no gateway yet whose result store could be asked."""
        self._reply_to = self._app.gateway.reply_to or protocol.new_id()
        return self._reply_to

    def _deadline(self, timeout: float | None) -> float:
        return self._app.settings.broker.publish_timeout if timeout is None else timeout

    def _sent(self, messages: Sequence[Message]) -> None:
        if (parent := current_request()) is not None:
            parent.children.extend(message.id for message in messages)
        if self._after:
            self._after(messages=messages)


def _untold(messages: Sequence[Message], exc: UmbelError) -> None:
    """The broker has them, so they are sent: the sender must not be told otherwise."""
    logger.warning("%d tasks from %s on are sent, and have no record of it: %s", len(messages), messages[0].id, exc)


def _due(call: CallOptions, now: float) -> float | None:
    eta, countdown = call.get("eta"), call.get("countdown")
    if eta is not None and countdown is not None:
        raise ValueError("give countdown or eta, not both")
    if countdown is not None:
        return now + countdown if countdown > 0 else None
    return _moment(eta, now)


def _moment(value: float | datetime | None, now: float) -> float | None:
    """Seconds from now or a moment (naive: UTC) as Unix time."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return None if value is None else now + value


def _embed(call: CallOptions) -> Embed:
    link, link_error, chain, chord = (call.get(name) for name in ("link", "link_error", "chain", "chord"))
    if not (link or link_error or chain or chord):
        return NO_EMBED
    return Embed(
        callbacks=plain_signatures(link),
        errbacks=plain_signatures(link_error),
        chain=plain_signatures(chain),
        chord=chord,  # type: ignore[arg-type]  # CallOptions says it is a mapping or absent
    )
