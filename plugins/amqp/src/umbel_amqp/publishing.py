"""Publishing under confirms: each batch in one write, answered message by message."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Final

from attrs import define, field, frozen

from umbel.errors import BrokerUnavailable, PublishRefused
from umbel_amqp import frames
from umbel_amqp.channel import Channel, ChannelClosed

_PORTION: Final = 2**18
"""Bytes written before looking whether they leave."""

_SIZE: Final = re.compile(r"size (\d+)")

NOT_TAKEN: Final = "the queue does not take it (is it full, or without a leader?)"
"""What the broker says by ``basic.nack``: for now."""


@frozen
class Parcel:
    """A message ready to be sent."""

    exchange: str
    routing_key: str
    properties: bytes
    body: bytes


@define(eq=False)
class _Batch:
    parcels: Sequence[Parcel]
    done: asyncio.Future[None]
    left: int
    outcomes: dict[int, str] = field(factory=dict)
    """What the broker said of those it did not take, by their place; empty text: no queue took it."""


class Publisher:
    """Publishes on one channel. Concurrent calls share it, and not each other's faults."""

    def __init__(self, channel: Channel) -> None:
        """``channel`` confirms."""
        self._channel = channel
        self._next = 1
        self._retired = False
        self._pending: dict[int, tuple[_Batch, int]] = {}
        channel.on_confirm = self._confirmed
        channel.on_return = self._returned
        channel.on_death.append(self._ended)

    async def publish(self, parcels: Sequence[Parcel]) -> dict[int, str]:
        """Send, and wait until the broker has answered for every one.

        Returns, by their places, those that it did not take, and what it said; empty where they reached no queue. Raises
        ``PublishRefused``, ``BrokerUnavailable``.
        """
        channel, connection = self._channel, self._channel.connection
        if channel.dead is not None:
            raise _unavailable(channel.dead)
        batch = _Batch(parcels, asyncio.get_running_loop().create_future(), len(parcels))
        written: list[bytes] = []
        size = 0
        for place, parcel in enumerate(parcels):
            self._pending[self._next] = batch, place
            self._next += 1
            written.append(frames.publish_frame(channel.number, parcel.exchange, parcel.routing_key, True))
            written += frames.content_frames(channel.number, parcel.properties, parcel.body, connection.frame_max)
            size += len(parcel.body) + 512
            if size > _PORTION:
                connection.write(b"".join(written))
                written.clear()
                size = 0
        connection.write(b"".join(written))
        await batch.done
        return batch.outcomes

    def _confirmed(self, tag: int, multiple: bool, accepted: bool) -> None:
        pending = self._pending
        if not multiple:
            if (one := pending.pop(tag, None)) is not None:
                self._answered(*one, accepted)
            return
        for number in list(pending):
            if number > tag:
                break
            self._answered(*pending.pop(number), accepted)

    def _answered(self, batch: _Batch, place: int, accepted: bool) -> None:
        if not accepted:
            batch.outcomes.setdefault(place, NOT_TAKEN)
        batch.left -= 1
        if not batch.left and not batch.done.done():
            batch.done.set_result(None)
        self._close_if_over()

    def retire(self) -> None:
        """Close the channel once all is answered. Nothing more is published on it."""
        self._retired = True
        self._close_if_over()

    def _close_if_over(self) -> None:
        if self._retired and not self._pending and self._channel.dead is None:
            self._channel.close()

    def _returned(self, code: int, reason: str, exchange: str, routing_key: str, body: bytes) -> None:
        """A return comes before its confirm, and says nothing of the number: it is the first alike that has no answer."""
        for batch, place in self._pending.values():
            parcel = batch.parcels[place]
            same = (parcel.exchange, parcel.routing_key, parcel.body) == (exchange, routing_key, body)
            if same and place not in batch.outcomes:
                batch.outcomes[place] = "" if code == 312 else reason
                return

    def _ended(self, reason: Exception) -> None:
        batches = {id(batch): batch for batch, _ in self._pending.values()}
        self._pending.clear()
        for batch in batches.values():
            if not batch.done.done():
                batch.done.set_exception(_blame(reason, batch))
                batch.done.exception()  # its caller may be gone


def _blame(reason: Exception, batch: _Batch) -> Exception:
    """What the death of the channel means for one batch: only its cause is refused."""
    if isinstance(reason, ChannelClosed):
        if size := _SIZE.search(reason.text):
            if any(len(parcel.body) == int(size[1]) for parcel in batch.parcels):
                return PublishRefused(
                    f"the broker refuses a message: {reason.text}; raise its max_message_size, or lower the option of that name"
                )
        elif reason.code in (403, 404, 406):
            return PublishRefused(f"the broker refuses to publish: {reason.text}")
    return _unavailable(reason)


def _unavailable(reason: Exception) -> Exception:
    return reason if isinstance(reason, BrokerUnavailable) else BrokerUnavailable(f"publishing ended: {reason}")
