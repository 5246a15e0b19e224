"""Law 2, the whole table: outcome and policy decide the one settlement of a delivery."""

from __future__ import annotations

import itertools

import pytest

from umbel.model import Action, Delivery, Message, Outcome, Verdict
from umbel.worker import settle
from umbel.worker.settle import UNKNOWN_TASK_TRIES, backoff, concludes, decide, exhausted, starts_so_far

ACK, REQUEUE, DEAD = Action.ACK, Action.REQUEUE, Action.DEAD


def delivery(count: int = 1, starts: int = 0) -> Delivery:
    return Delivery(message=Message(queue="q"), queue="q", token=None, count=count, starts=starts)


def outcome(verdict: Verdict, detail: str = "why") -> Outcome:
    return Outcome(verdict=verdict, detail=detail)


ALWAYS = {
    Verdict.SUCCESS: (ACK, 0, True),
    Verdict.FAILURE: (ACK, 0, True),
    Verdict.RETRY: (ACK, 0, True),
    Verdict.FORWARDED: (ACK, 0, True),
    Verdict.IGNORED: (ACK, 0, True),
    Verdict.EXPIRED: (ACK, 0, True),
    Verdict.REVOKED: (ACK, 0, True),
    Verdict.TIMED_OUT: (ACK, 0, True),
    Verdict.REJECTED: (DEAD, 0, True),
    Verdict.UNREADABLE: (DEAD, 0, True),
    Verdict.REQUEUED: (REQUEUE, 1, False),
    Verdict.CANCELLED: (REQUEUE, 0, False),
    Verdict.RETURNED: (REQUEUE, 0, False),
}
"""Verdicts that end alike however often the message was handed out: action, delay, whether it counts."""


def expected(verdict: Verdict, count: int, starts: int, max_deliveries: int) -> tuple[Action, float, bool]:
    if verdict in ALWAYS:
        return ALWAYS[verdict]
    if verdict is Verdict.UNKNOWN_TASK:
        return (REQUEUE, 2.0 ** (count - 1), True) if count < UNKNOWN_TASK_TRIES else (DEAD, 0, True)
    assert verdict is Verdict.LOST
    return (REQUEUE, 2.0 ** (starts - 1), True) if starts < max_deliveries else (DEAD, 0, True)


@pytest.mark.parametrize("verdict", Verdict)
def test_every_verdict_has_its_settlement(verdict: Verdict) -> None:
    for count, starts, most in itertools.product(range(1, 9), range(1, 6), range(1, 6)):
        got = decide(outcome(verdict), delivery(count), starts=starts, max_deliveries=most)
        assert (got.action, got.delay, got.counted) == expected(verdict, count, starts, most), (count, starts, most)
        assert got.cause == (f"{verdict.value}: why" if got.action is DEAD else "")


@pytest.mark.parametrize("verdict", Verdict)
def test_a_task_that_wants_its_failures_kept_has_them_among_the_dead_letters(verdict: Verdict) -> None:
    plain = decide(outcome(verdict), delivery(), starts=1, max_deliveries=3)
    kept = decide(outcome(verdict), delivery(), starts=1, max_deliveries=3, dead_letter=True)
    if verdict in (Verdict.FAILURE, Verdict.TIMED_OUT):
        assert (kept.action, kept.cause) == (DEAD, f"{verdict.value}: why")
    else:
        assert kept == plain


def test_a_dead_letter_without_a_detail_has_its_verdict_for_a_cause() -> None:
    got = decide(outcome(Verdict.UNREADABLE, ""), delivery(), starts=1, max_deliveries=3)
    assert got.cause == "unreadable"


@pytest.mark.parametrize("verdict", Verdict)
def test_only_what_was_killed_for_good_needs_somebody_to_write_its_end(verdict: Verdict) -> None:
    for starts, most, early in itertools.product(range(1, 6), range(1, 6), (False, True)):
        got = concludes(outcome(verdict), delivery(), starts=starts, max_deliveries=most, early=early)
        killed = verdict is Verdict.TIMED_OUT or (verdict is Verdict.LOST and (early or starts >= most))
        assert got is killed, (starts, most, early)


@pytest.mark.parametrize("early", [False, True])
def test_what_nobody_concludes_is_not_dead_unless_its_executor_said_so(early: bool) -> None:
    """A lost delivery that is not concluded goes back to its queue: no result is owed to anybody yet."""
    for starts, most in itertools.product(range(1, 6), range(1, 6)):
        lost = outcome(Verdict.LOST)
        if not concludes(lost, delivery(), starts=starts, max_deliveries=most, early=early):
            assert decide(lost, delivery(), starts=starts, max_deliveries=most).action is REQUEUE


@pytest.mark.parametrize(
    ("count", "starts", "marked", "unmarked"),
    [(1, 0, 0, 0), (2, 0, 1, 1), (2, 1, 2, 1), (3, 0, 1, 2), (3, 1, 2, 2), (3, 2, 3, 2), (9, 0, 1, 8)],
)
def test_starts_are_counted_by_their_marks_where_the_broker_keeps_them(
    count: int, starts: int, marked: int, unmarked: int
) -> None:
    assert starts_so_far(delivery(count, starts), True) == marked
    assert starts_so_far(delivery(count, starts), False) == unmarked


def test_a_message_is_exhausted_when_it_has_started_as_often_as_it_may() -> None:
    assert [exhausted(starts, 3) for starts in range(5)] == [False, False, False, True, True]


def test_backoff_doubles_from_a_second_up_to_its_longest() -> None:
    assert [backoff(n) for n in range(9)] == [1, 1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff(10**9) == 60
    assert backoff(5, longest=3) == 3


def test_every_verdict_is_in_the_table() -> None:
    assert set(ALWAYS) | {Verdict.UNKNOWN_TASK, Verdict.LOST} == set(Verdict)
    assert (settle.UNKNOWN_TASK_TRIES, settle.REJECT_PAUSE) == (6, 1.0)
