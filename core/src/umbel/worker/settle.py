"""Law 2: every delivery ends in exactly one settlement, decided here. Pure functions and one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from umbel.model import Action, Delivery, Outcome, Settlement, Verdict

UNKNOWN_TASK_TRIES: Final = 6
"""How often an unknown task is offered again before it goes to the dead letters: in a rolling deploy the worker that
knows it may be a moment away. The pauses are 1, 2, 4, 8, 16 s."""

REJECT_PAUSE: Final = 1.0
"""Seconds before a task that raised ``Reject(requeue=True)`` is offered again."""

_FIXED: Final[Mapping[Verdict, Action]] = {
    Verdict.FAILURE: Action.ACK,
    Verdict.RETRY: Action.ACK,
    Verdict.FORWARDED: Action.ACK,
    Verdict.IGNORED: Action.ACK,
    Verdict.EXPIRED: Action.ACK,
    Verdict.REVOKED: Action.ACK,
    Verdict.TIMED_OUT: Action.ACK,
    Verdict.REJECTED: Action.DEAD,
    Verdict.UNREADABLE: Action.DEAD,
}


def starts_so_far(delivery: Delivery, start_marks: bool) -> int:
    """How often work on the message may have begun before this handing-out.

    Where the broker records starts, the first handing-out counts as a start once it is over, later ones only if they
    were marked: a message that a killed worker merely held is not blamed. Elsewhere every handing-out counts.
    """
    if delivery.count <= 1:
        return 0
    return 1 + delivery.starts if start_marks else delivery.count - 1


def exhausted(starts: int, max_deliveries: int) -> bool:
    """Whether a message whose work has begun ``starts`` times, and never ended, is not to be started again."""
    return starts >= max_deliveries


def backoff(times: int, longest: float = 60.0) -> float:
    """Seconds to wait after the ``times``-th loss: 1, 2, 4, … up to ``longest``."""
    return float(min(2.0 ** min(max(times - 1, 0), 16), longest))


def decide(
    outcome: Outcome, delivery: Delivery, *, starts: int, max_deliveries: int, dead_letter: bool = False
) -> Settlement:
    """How ``delivery`` ends.

    ``starts``: how often its work has begun, this time included. ``dead_letter``: the task wants its failures kept.
    """
    verdict = outcome.verdict
    if verdict is Verdict.SUCCESS:  # almost always, and before anything that asks an enum for its hash
        return Settlement(delivery=delivery, action=Action.ACK)
    if dead_letter and verdict in (Verdict.FAILURE, Verdict.TIMED_OUT):
        return Settlement(delivery=delivery, action=Action.DEAD, cause=_cause(outcome))
    if (action := _FIXED.get(verdict)) is not None:
        return Settlement(delivery=delivery, action=action, cause=_cause(outcome) if action is Action.DEAD else "")
    match verdict:
        case Verdict.RETURNED | Verdict.CANCELLED:
            return Settlement(delivery=delivery, action=Action.REQUEUE, counted=False, delay=outcome.delay)
        case Verdict.REQUEUED:  # it has run to its end: not counted, but with a pause, so that it does not spin
            return Settlement(delivery=delivery, action=Action.REQUEUE, counted=False, delay=REJECT_PAUSE)
        case Verdict.UNKNOWN_TASK if delivery.count < UNKNOWN_TASK_TRIES:
            return Settlement(delivery=delivery, action=Action.REQUEUE, delay=backoff(delivery.count))
        case Verdict.LOST if not exhausted(starts, max_deliveries):
            return Settlement(delivery=delivery, action=Action.REQUEUE, delay=backoff(starts))
        case _:
            return Settlement(delivery=delivery, action=Action.DEAD, cause=_cause(outcome))


def concludes(outcome: Outcome, delivery: Delivery, *, starts: int, max_deliveries: int, early: bool) -> bool:
    """Whether a job that ended without its executor's word needs one: its failure stored, its errbacks sent."""
    if outcome.verdict is Verdict.TIMED_OUT:
        return True
    return outcome.verdict is Verdict.LOST and (early or exhausted(starts, max_deliveries))


def _cause(outcome: Outcome) -> str:
    return f"{outcome.verdict.value}: {outcome.detail}" if outcome.detail else outcome.verdict.value
