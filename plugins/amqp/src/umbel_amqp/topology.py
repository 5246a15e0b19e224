"""What stands in the broker: queues, exchanges, bindings, the steps of delays; and what a session knows of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pamqp import base
from pamqp.commands import Queue

from umbel.errors import PublishRefused
from umbel.model import QueueSpec
from umbel_amqp import delays
from umbel_amqp.channel import ChannelClosed, Control
from umbel_amqp.frames import ExchangeBind, ExchangeDeclare, QueueBind, QueueDeclare, QueuePurge
from umbel_amqp.options import QUEUE_TYPES, TransportOptions

_DIFFERS: Final = re.compile(
    r"inequivalent arg '([^']+)' for (queue|exchange) .*: received (.*) but current is (.*)", re.S
)
_NOT_FOUND, _PRECONDITION = 404, 406

_SETTINGS: Final[Mapping[str, str]] = {
    "x-queue-type": "type",
    "x-max-priority": "max_priority",
    "type": "exchange_type",
}
"""Settings of ``[queues.NAME]`` by the name that the broker has for them."""


class Topology:
    """Declares what is needed, once a session: ``forget`` when one is lost."""

    def __init__(self, options: TransportOptions) -> None:
        self._options = options
        self._specs: dict[str, QueueSpec] = {}
        self._queues: set[str] = set()
        self._exchanges: set[str] = set()
        self._steps: dict[delays.Target, int] = {}
        """How many of ``delays.STEPS`` a target has, from the shortest up."""
        self._keys: set[str] = set()
        self._declaring = asyncio.Lock()

    def forget(self) -> None:
        """Nothing is known any more of what stands in the broker."""
        for known in (self._queues, self._exchanges, self._steps, self._keys):
            known.clear()

    def forget_queue(self, name: str) -> None:
        """Someone has deleted it."""
        self._queues.discard(name)
        target = delays.Target(name)
        self._keys.difference_update([key for key in self._keys if key.endswith(target.key(0, 0)[9:])])

    @property
    def names(self) -> Iterable[str]:
        """Queues that were declared, in their order."""
        return dict.fromkeys((*self._specs, *sorted(self._queues)))

    # --- queues --------------------------------------------------------------------------------------

    async def declare(self, control: Control, spec: QueueSpec) -> None:
        """Make it exist exactly as described. Raises ``PublishRefused`` naming the setting that differs."""
        kind = spec.type or self._options.queue_type
        if kind not in QUEUE_TYPES:
            raise PublishRefused(f"{_section(spec.name)} type must be {' or '.join(QUEUE_TYPES)}, not {spec.type!r}")
        if kind == "quorum" and spec.max_priority is not None:
            raise PublishRefused(
                f'queue {spec.name!r}: quorum queues take no max_priority; set {_section(spec.name)} type = "classic", or '
                "remove max_priority"
            )
        try:
            await control.ask(self._queue(spec))
            await control.ask(*self._bindings(spec))
        except ChannelClosed as refusal:
            raise PublishRefused(_explain(spec.name, refusal)) from refusal
        self._specs[spec.name] = spec
        self._queues.add(spec.name)

    async def ensure(self, control: Control, names: Iterable[str]) -> None:
        """Make queues exist: as they were declared, or by the defaults; one that is there already may be of any kind."""
        for name in names:
            if name in self._queues:
                continue
            spec = self._specs.get(name) or QueueSpec(name=name)
            try:
                await control.ask(self._queue(spec))
                await control.ask(*self._bindings(spec))
            except ChannelClosed as refusal:
                if refusal.code != _PRECONDITION:
                    raise PublishRefused(_explain(name, refusal)) from refusal
            self._queues.add(name)

    def _queue(self, spec: QueueSpec) -> base.Frame:
        arguments: dict[str, Any] = dict(spec.arguments)
        if (spec.type or self._options.queue_type) == "quorum":
            arguments = {"x-queue-type": "quorum", "x-delivery-limit": self._options.delivery_limit, **arguments}
            if not arguments["x-delivery-limit"]:
                del arguments["x-delivery-limit"]
        elif (priorities := spec.max_priority or self._options.max_priority) is not None:
            arguments = {"x-max-priority": priorities, **arguments}
        return QueueDeclare(queue=spec.name, durable=True, arguments=arguments)

    def _bindings(self, spec: QueueSpec) -> Sequence[base.Frame]:
        """A queue without an exchange of its own gets what Celery gives it: one of its name."""
        exchange = spec.exchange or spec.name
        kind = spec.exchange_type if spec.exchange else "direct"
        key = spec.name if spec.routing_key is None or not spec.exchange else spec.routing_key
        return (
            ExchangeDeclare(exchange=exchange, exchange_type=kind, durable=True),
            QueueBind(queue=spec.name, exchange=exchange, routing_key=key, arguments={}),
        )

    async def ensure_exchange(self, control: Control, name: str) -> None:
        """Raises ``PublishRefused`` where there is no such exchange."""
        if name in self._exchanges:
            return
        try:
            await control.ask(ExchangeDeclare(exchange=name, passive=True))
        except ChannelClosed as refusal:
            raise PublishRefused(
                f"there is no exchange {name!r}: name it in the settings of a queue that is bound to it, "
                f"[queues.…] exchange = {name!r} ({refusal.text})"
            ) from refusal
        self._exchanges.add(name)

    # --- delays --------------------------------------------------------------------------------------

    async def ensure_path(self, control: Control, target: delays.Target, path: tuple[int, ...]) -> None:
        """Make the steps of ``path``, and all shorter ones: that they have no gap makes them easy to find again."""
        keys = target.keys(path)
        if self._keys.issuperset(keys):
            return
        needed = delays.STEPS.index(path[0]) + 1
        methods: list[base.Frame] = []
        if delays.ENTRY not in self._exchanges:
            methods.append(_durable(delays.ENTRY))
        have = self._steps.get(target, 0)
        for step in delays.STEPS[have:needed]:
            if (after := delays.exchange_of(step)) not in self._exchanges:
                methods.append(_durable(after))
            methods.append(QueueDeclare(queue=target.queue(step), durable=True, arguments=delays.arguments_of(step)))
        for key, before, after_step in zip(keys, (0, *path), (*path, 0), strict=True):
            source = delays.exchange_of(before) if before else delays.ENTRY
            if after_step:
                methods.append(
                    QueueBind(queue=target.queue(after_step), exchange=source, routing_key=key, arguments={})
                )
            elif target.exchange:
                methods.append(ExchangeBind(destination=target.name, source=source, routing_key=key, arguments={}))
            else:
                methods.append(QueueBind(queue=target.name, exchange=source, routing_key=key, arguments={}))
        try:
            await control.ask(*methods)
        except ChannelClosed as refusal:
            raise PublishRefused(
                f"{'exchange' if target.exchange else 'queue'} {target.name!r} cannot have delays: {refusal.text} (delays "
                "need quorum queues with a time to live: RabbitMQ 3.10 or newer)"
            ) from refusal
        self._steps[target] = max(have, needed)
        self._keys.update(keys)
        self._exchanges.add(delays.ENTRY)
        self._exchanges.update(map(delays.exchange_of, delays.STEPS[:needed]))

    # --- counting and emptying -----------------------------------------------------------------------

    async def counts(self, control: Control, queue: str) -> tuple[int, int]:
        """Ready and delayed messages."""
        answers, _ = await control.try_(QueueDeclare(queue=queue, passive=True))
        if not answers:
            return 0, 0
        target = delays.Target(queue)
        waiting, _ = await control.try_(*(QueueDeclare(queue=target.queue(s), passive=True) for s in delays.STEPS))
        return _messages(answers), _messages(waiting)

    async def purge(self, control: Control, queue: str) -> int:
        target = delays.Target(queue)
        waiting, _ = await control.try_(*(QueuePurge(queue=target.queue(step)) for step in delays.STEPS))
        ready, _ = await control.try_(QueuePurge(queue=queue))
        return _messages(waiting) + _messages(ready)

    async def steps(self, control: Control, queue: str) -> Sequence[str]:
        """Queues in which messages for ``queue`` wait for their time."""
        target = delays.Target(queue)
        names = [target.queue(step) for step in delays.STEPS]
        found, _ = await control.try_(*(QueueDeclare(queue=name, passive=True) for name in names))
        return [name for name, answer in zip(names, found, strict=False) if answer.message_count]


def _messages(answers: Iterable[Queue.DeclareOk | Queue.PurgeOk]) -> int:
    return sum(answer.message_count or 0 for answer in answers)


def _durable(exchange: str) -> base.Frame:
    return ExchangeDeclare(exchange=exchange, exchange_type="direct", durable=True)


def _section(queue: str) -> str:
    return f'[queues."{queue}"]'


def _explain(queue: str, refusal: ChannelClosed) -> str:
    """What differs between the settings and the broker, and what mends it."""
    if (differs := _DIFFERS.search(refusal.text)) is None:
        return f"the broker refuses queue {queue!r} as {_section(queue)} describes it: {refusal.text}"
    argument, _, wanted, present = differs.groups()
    setting = _SETTINGS.get(argument, f"arguments.{argument}")
    return (
        f"queue {queue!r} exists with another {argument}: the settings ask for {_value(wanted)}, the broker has "
        f"{_value(present)}; set {_section(queue)} {setting} to what the broker has, or delete the queue there"
    )


def _value(text: str) -> str:
    """The value in what RabbitMQ says of it: ``the value 'quorum' of type 'longstr'``, ``none``, ``'direct'``."""
    found = re.search(r"'([^']*)'", text)
    return repr(found[1]) if found else "none"
