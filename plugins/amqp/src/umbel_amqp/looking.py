"""Looking into a queue, for which AMQP has nothing: messages are taken, and put back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from attrs import define, field
from pamqp.commands import Basic

from umbel.model import Message, evolve
from umbel_amqp import frames
from umbel_amqp.channel import Channel, ChannelClosed, Control, Raw
from umbel_amqp.connection import Connection
from umbel_amqp.messages import read_message
from umbel_amqp.sessions import Item, uncounted
from umbel_amqp.topology import Topology

_FEW: Final = 200
_LITTLE: Final = 4 * 2**20
"""Messages, and bytes of bodies, that are taken to look at any of them, so that their counts can be kept."""
_PORTION: Final = 50


@define(eq=False)
class _Borrowed:
    """What was taken, in its order; it goes back unless ``replaced``."""

    raws: list[Raw] = field(factory=list)
    more: bool = True
    """There are others behind these."""
    replaced: bool = False


async def peek(
    control: Control, topology: Topology, publish: Callable[[Sequence[Item]], Awaitable[None]], queue: str, number: int
) -> list[Message]:
    """The first ``number`` messages, the delayed behind the ready ones.

    Where little is there, copies with the old counts take the places of all; else those seen count one more delivery.
    """
    connection = control.connection
    async with _borrowed(connection, queue, max(number, _FEW)) as ready:
        received = [read_message(raw, queue, connection.inherits_counts) for raw in ready.raws]
        if received and not ready.more and sum(len(raw[5]) for raw in ready.raws) <= _LITTLE:
            await publish([uncounted(message, past.count, past.starts) for message, past in received])
            ready.replaced = True
    found = [message for message, _ in received]
    if len(found) >= number or ready.more:
        return found[:number]
    delayed: list[Message] = []
    for name in await topology.steps(control, queue):
        async with _borrowed(connection, name, number) as waiting:
            later = [read_message(raw, queue) for raw in waiting.raws]
            delayed += [evolve(message, due=past.due) for message, past in later]
    return (found + sorted(delayed, key=lambda message: message.due or 0.0))[:number]


@asynccontextmanager
async def _borrowed(connection: Connection, queue: str, number: int) -> AsyncIterator[_Borrowed]:
    channel = await connection.channel()
    borrowed, end = _Borrowed(), channel.close
    try:
        await _take(channel, queue, number, borrowed)
        yield borrowed
        if borrowed.raws:
            write = frames.ack_frame if borrowed.replaced else frames.requeue_frame
            channel.settle(write(channel.number, borrowed.raws[-1][0], multiple=True))
            await channel.call(
                Basic.Qos(0, 0, False)
            )  # answered: the broker has them; a quorum queue counts them a moment later
            end = channel.close_soon
    finally:
        end()


async def _take(channel: Channel, queue: str, number: int, borrowed: _Borrowed) -> None:
    raws, size = borrowed.raws, 0
    try:
        while borrowed.more and len(raws) < number and (size <= _LITTLE or len(raws) < number - _FEW):
            for answer in [channel.call(frames.Get(queue=queue)) for _ in range(min(number - len(raws), _PORTION))]:
                raw = await asyncio.shield(answer)
                if isinstance(raw, Basic.GetEmpty):
                    borrowed.more = False
                else:
                    raws.append(raw)
                    size += len(raw[5])
    except ChannelClosed as refusal:
        if refusal.code != 404:
            raise
        borrowed.more = False  # there is no such queue
