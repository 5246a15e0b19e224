"""What is handed out: which tag on which channel stands for a delivery now, and how tags are acknowledged together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from attrs import define, field

from umbel.model import Message
from umbel_amqp import frames
from umbel_amqp.channel import Channel
from umbel_amqp.messages import Past


class Tags:
    """The unacknowledged tags of one channel, in their order, and by which consumer they came."""

    def __init__(self, channel: Channel, release: Callable[[], None] | None = None) -> None:
        """``release`` is called when tags were settled and none is left."""
        self.channel = channel
        self._release = release
        self.out: Counter[str] = Counter()
        """How many each consumer has out."""
        self._open: dict[int, str] = {}
        self._later: list[int] | None = None
        """Acknowledged while that is to wait."""

    def __len__(self) -> int:
        return len(self._open)

    def add(self, tags: Sequence[int], consumer: str) -> None:
        self._open.update(dict.fromkeys(tags, consumer))
        self.out[consumer] += len(tags)

    def ack(self, tags: Sequence[int]) -> None:
        """One frame for all up to the highest below which nothing is left, one each for the rest. Raises if it is dead."""
        if self._later is not None:
            self._later += tags
            return
        done = set(tags)
        first: list[int] = []
        for tag in self._open:
            if tag not in done:
                break
            first.append(tag)
        number, written = self.channel.number, []
        if len(first) > 1:
            written.append(frames.ack_frame(number, first[-1], multiple=True))
            done.difference_update(first)
        written += [frames.ack_frame(number, tag) for tag in tags if tag in done]
        self.channel.settle(b"".join(written))
        self._forget(tags)
        self.release()

    def release(self) -> None:
        """Say so, if none is left."""
        if self._release is not None and not self._open:
            self._release()

    def pause(self) -> None:
        """Let acknowledgements wait for ``resume``."""
        self._later = []

    def resume(self) -> None:
        later, self._later = self._later, None
        if later and self.channel.dead is None:
            self.ack(later)

    def requeue(self, tags: Sequence[int]) -> None:
        """Back to their places, which counts as a delivery. Call ``release`` when they are there. Raises if it is dead."""
        self.channel.settle(b"".join(frames.requeue_frame(self.channel.number, tag) for tag in tags))
        self._forget(tags)

    def _forget(self, tags: Sequence[int]) -> None:
        forget, out = self._open.pop, self.out
        gone = Counter([consumer for tag in tags if (consumer := forget(tag, None)) is not None])
        for consumer, number in gone.items():
            out[consumer] -= number


@define(eq=False)
class Hold:
    """The token of a delivery. Fenced by its channel: when that is dead, the message belongs to others."""

    message: Message
    past: Past
    tags: Tags
    tag: int
    since: float
    """Since when the present tag is out, by the monotonic clock."""
    number: int
    """Of this delivery in its session."""
    marked: bool = False
    """Its start is recorded in the copy that is parked."""
    parked: bool = False
    ended: bool = field(default=False)
    """Settled, or being settled."""

    @property
    def all_starts(self) -> int:
        """With this one, if it is recorded."""
        return self.past.starts + self.marked

    @property
    def live(self) -> bool:
        return not self.ended and self.tags.channel.dead is None
