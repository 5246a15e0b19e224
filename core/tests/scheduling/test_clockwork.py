"""What is decided about an entry that is due: slots, catch-up, overlap, jitter, limits. No I/O, no clock."""

from __future__ import annotations

import random
from typing import Any

import pytest
from attrs import evolve

from umbel.model import ScheduleEntry
from umbel.ports.timetable import Timetable
from umbel.scheduling.clockwork import AT_ONCE, Decision, decide, next_due
from umbel.scheduling.terms import Terms, put_off, run_id
from umbel.scheduling.timetables import Dates, Every

EVERY_10 = Every(10.0)


def entry(**fields: Any) -> ScheduleEntry:
    return ScheduleEntry(name="e", task="t", schedule={}, **fields)


def terms(**fields: Any) -> Terms:
    return Terms(when={"every": 10.0}, **{"since": 1000.0, **fields})


def due(
    now: float,
    said: Terms | None = None,
    *,
    known: ScheduleEntry | None = None,
    table: Timetable = EVERY_10,
    **more: Any,
) -> Decision:
    return decide(known or entry(last_due=1000.0), said or terms(), table, now=now, **more)


def test_a_slot_is_sent_once_and_the_next_one_follows() -> None:
    decision = due(1010.2)
    assert decision.send == (1010.0,)
    after = decision.after
    assert (after.last_due, after.last_sent, after.next_due, after.total_runs) == (1010.0, 1010.0, 1020.0, 1)
    assert due(1010.2, known=after).send == ()
    assert due(1010.2, known=after).after.next_due == 1020.0


def test_a_new_entry_is_due_after_it_was_made() -> None:
    assert next_due(entry(), terms(since=1003.0), EVERY_10) == 1010.0
    assert next_due(entry(), terms(since=1010.0), EVERY_10) == 1020.0


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        ({"catch_up": "one"}, (1500.0,)),
        ({"catch_up": "none"}, (1500.0,)),
        ({"catch_up": "all"}, tuple(1010.0 + 10 * n for n in range(50))),
        ({"catch_up": "all", "catch_up_within": 25.0}, (1480.0, 1490.0, 1500.0)),
        ({"catch_up": "one", "catch_up_within": 1.0}, ()),
        ({"catch_up": "none", "catch_up_within": 1.0}, ()),
    ],
)
def test_catching_up_after_an_outage(said: dict[str, Any], sent: tuple[float, ...]) -> None:
    decision = due(1502.0, terms(**said))
    assert decision.send == sent
    assert (decision.after.last_due, decision.after.next_due) == (1500.0, 1510.0)
    assert bool(decision.passed_over) is not bool(sent)


def test_none_means_none_that_is_older_than_a_minute() -> None:
    daily = Every(86_400.0)
    assert due(86_400.0 + 59, terms(catch_up="none"), table=daily).send == (86_400.0,)
    assert due(86_400.0 + 61, terms(catch_up="none"), table=daily).send == ()
    assert due(86_400.0 + 61, terms(catch_up="one"), table=daily).send == (86_400.0,)


def test_many_missed_slots_are_sent_a_part_at_a_time_and_each_once() -> None:
    known, sent = entry(last_due=1000.0), []
    for _ in range(10):
        decision = due(4005.0, terms(catch_up="all"), known=known)
        sent += decision.send
        known = decision.after
        if decision.send:
            assert len(decision.send) <= AT_ONCE
            assert len(sent) == 300 or (known.next_due or 0) <= 4005.0
    assert sent == [1010.0 + 10 * n for n in range(300)]


def test_an_outage_of_years_is_looked_at_from_behind() -> None:
    looked = []

    class Counting(Timetable):
        def next_after(self, moment: float) -> float | None:
            looked.append(moment)
            return EVERY_10.next_after(moment)

    assert due(1e9 + 3, table=Counting()).send == (1e9,)
    assert len(looked) < 50


def test_start_and_end_bound_the_slots() -> None:
    said = terms(start=1015.0, end=1030.0, catch_up="all")
    anchored = Every(10.0, 1015.0)
    assert next_due(entry(), said, anchored) == 1015.0
    decision = due(2000.0, said, known=entry(), table=anchored)
    assert decision.send == (1015.0, 1025.0)
    assert decision.after.next_due is None


def test_after_its_most_runs_an_entry_is_over() -> None:
    said = terms(max_runs=3, catch_up="all")
    decision = due(1100.0, said, known=entry(last_due=1000.0, total_runs=1))
    assert decision.send == (1010.0, 1020.0)
    assert (decision.after.total_runs, decision.after.next_due) == (3, None)
    assert due(1200.0, said, known=evolve(decision.after, next_due=1.0)).send == ()


def test_dates_come_once() -> None:
    table = Dates((1005.0, 1050.0))
    decision = due(1006.0, table=table)
    assert (decision.send, decision.after.next_due) == ((1005.0,), 1050.0)
    decision = due(1051.0, known=decision.after, table=table)
    assert (decision.send, decision.after.next_due) == ((1050.0,), None)


# --- overlap --------------------------------------------------------------------------------------


def test_allowed_overlap_asks_nothing() -> None:
    assert due(1010.0, running=True).send == (1010.0,)


def test_skip_passes_over_while_the_earlier_run_goes_on() -> None:
    known = entry(last_due=1000.0, last_sent=1000.0)
    decision = due(1010.0, terms(overlap="skip"), known=known, running=True)
    assert (decision.send, decision.passed_over) == ((), "the earlier run has not ended")
    assert (decision.after.last_due, decision.after.last_sent, decision.after.next_due) == (1010.0, 1000.0, 1020.0)
    assert due(1020.0, terms(overlap="skip"), known=decision.after).send == (1020.0,)


def test_queue_waits_for_the_end_of_the_earlier_run() -> None:
    known = entry(last_due=1000.0, last_sent=1000.0)
    waiting = due(1010.5, terms(overlap="queue"), known=known, running=True)
    assert (waiting.send, waiting.after) == ((), evolve(known, next_due=1011.5))
    assert due(1043.0, terms(overlap="queue"), known=waiting.after).send == (1040.0,)
    said = terms(overlap="queue", catch_up="all")
    first = due(1043.0, said, known=waiting.after)
    assert first.send == (1010.0,)
    assert first.after.next_due == 1020.0
    assert due(1043.0, said, known=first.after, running=True).send == ()


def test_cancel_old_names_the_run_that_makes_way() -> None:
    known = entry(last_due=1000.0, last_sent=990.0)
    decision = due(1010.0, terms(overlap="cancel_old"), known=known, running=True)
    assert (decision.send, decision.cancel) == ((1010.0,), 990.0)
    assert due(1010.0, terms(overlap="cancel_old"), known=known).cancel is None


@pytest.mark.parametrize("overlap", ["skip", "cancel_old"])
def test_what_may_not_overlap_is_not_sent_in_a_row(overlap: str) -> None:
    assert due(1100.0, terms(overlap=overlap, catch_up="all")).send == (1100.0,)


# --- jitter ---------------------------------------------------------------------------------------


def test_jitter_is_the_same_for_everybody_and_spread() -> None:
    drawn = [put_off("e", 10.0 * n, 60.0) for n in range(1000)]
    assert drawn == [put_off("e", 10.0 * n, 60.0) for n in range(1000)]
    assert 0 <= min(drawn) < 3
    assert 57 < max(drawn) < 60
    assert 25 < sum(drawn) / 1000 < 35
    assert put_off("other", 10.0, 60.0) != put_off("e", 10.0, 60.0)
    assert put_off("e", 10.0, 0.0) == 0.0


def test_a_run_is_put_off_by_its_jitter_and_keeps_its_slot() -> None:
    said, moment = terms(jitter=5.0), 1010.0 + put_off("e", 1010.0, 5.0)
    assert next_due(entry(last_due=1000.0), said, EVERY_10) == moment
    assert due(moment - 0.002, said).send == ()
    assert due(moment, said).send == (1010.0,)


def test_no_order_of_looks_loses_or_doubles_a_slot() -> None:
    dice = random.Random(7)
    for _ in range(200):
        said = terms(jitter=dice.choice([0.0, 3.0, 9.0, 25.0]), catch_up="all")
        known, now, sent = entry(), 1000.0, []
        while now < 1300:
            now += dice.expovariate(0.2)
            decision = due(now, said, known=known)
            sent += [(slot, now) for slot in decision.send]
            known = decision.after
        assert [slot for slot, _ in sent] == [1010.0 + 10 * n for n in range(len(sent))]
        assert len(sent) >= 25
        assert all(now >= slot + put_off("e", slot, said.jitter) for slot, now in sent)


# --- names and terms ------------------------------------------------------------------------------


def test_a_run_s_id_is_made_of_its_entry_and_due_time() -> None:
    assert run_id("e", 1010.0) == run_id("e", 1010)
    assert len({run_id(name, slot) for name in ("a", "b") for slot in (0.0, 0.000001, 1.0)}) == 6


def test_terms_survive_as_plain_data() -> None:
    said = terms(jitter=5.0, overlap="skip", max_runs=3, paused=True)
    assert Terms.from_plain(said.to_plain()) == said
    assert "catch_up" not in said.to_plain()
    with pytest.raises(ValueError, match="says lunar, which this umbel-core does not know"):
        Terms.from_plain({**said.to_plain(), "lunar": True})
    with pytest.raises(ValueError, match="does not say when"):
        Terms.from_plain({})


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"overlap": "maybe"}, "overlap is one of allow, skip, queue, cancel_old"),
        ({"catch_up": "some"}, "catch_up is one of none, one, all"),
        ({"jitter": -1.0}, "jitter is a number of seconds"),
        ({"max_runs": 0}, "max_runs is 1 or more"),
        ({"start": 2.0, "end": 1.0}, "end comes before start"),
    ],
)
def test_terms_that_cannot_be_kept_are_refused(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        terms(**wrong)
