"""One delivery in a worker's hands."""

from __future__ import annotations

from attrs import define, field

from umbel.model import Delivery, Outcome, Settlement, TaskOptions, Verdict


@define(eq=False)
class Held:
    """One delivery from claim to settlement: the one mutable record of its execution."""

    delivery: Delivery
    options: TaskOptions
    job_id: int
    max_deliveries: int
    leased_until: float | None
    starts: int = 1
    """How often its work has begun, this time included."""
    delay: float = 0.0
    """Seconds that a return to the queue is to wait."""
    settled: bool = False
    """Acknowledged early: nothing is left to tell the broker."""
    lost: bool = False
    """The lease has passed to another: nothing of what is done here counts any more."""
    adrift: bool = False
    """The session that it was held by is lost: the broker hands it out again, perhaps to us."""
    told_started: bool = False
    """Listeners have heard that its work has begun."""
    concluding: Verdict | None = None
    """The pool was asked to write the end of a task whose process was lost or killed."""

    def awaits(self, delivery: Delivery, now: float) -> bool:
        """Whether ``delivery`` is this message handed out again: what is done here then counts for it.

        The retry of a task has the same id as the task, and another number of retries.
        """
        ours, again = self.delivery.message, delivery.message
        ended = self.adrift or self.lost or (self.leased_until is not None and self.leased_until <= now)
        same = ours.id == again.id and ours.headers.get("retries") == again.headers.get("retries")
        return ended and not self.settled and bool(ours.id) and same and self.delivery.queue == delivery.queue

    def adopt(self, delivery: Delivery) -> None:
        """Go on under a new handing-out of the same message."""
        self.delivery, self.leased_until = delivery, delivery.leased_until
        self.adrift = self.lost = False

    def extend(self, until: float) -> None:
        """The broker has extended the lease."""
        if self.leased_until is not None:
            self.leased_until = until


@define(eq=False)
class End:
    """What came of a delivery, on its way to the store and the broker."""

    held: Held
    outcome: Outcome
    settlement: Settlement | None = field(default=None)
