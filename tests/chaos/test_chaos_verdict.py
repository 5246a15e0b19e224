"""The judge of the chaos is judged: each thing that may go wrong is found, and named for what it is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from cluster import until
from load import MIX, mixed
from stage import Watch
from verdict import Evidence, Sent, Struck, judge

A = Sent(id="a", kind="quick", at=0.5)


def line(what: str, at: float, *, id: str = "a", worker: str = "w1", pid: int = 7, retries: int = 0) -> dict[str, Any]:
    return {"what": what, "id": id, "at": at, "worker": worker, "pid": pid, "retries": retries}


ONCE = [line("start", 1.0), line("end", 1.1)]
DONE = {"a": "SUCCESS"}


def test_what_ended_as_it_must_is_good() -> None:
    verdict = judge(Evidence(sent=[A], lines=ONCE, states=DONE))
    assert verdict.good
    assert (verdict.sent, verdict.starts, verdict.again) == (1, 1, [])


@pytest.mark.parametrize(
    ("states", "left", "found"),
    [({}, 0, "lost"), ({"a": "RETRY"}, 0, "lost"), ({}, 1, "stuck"), ({"a": "FAILURE"}, 0, "wrong")],
)
def test_what_did_not_end_or_ended_otherwise_is_found(states: dict[str, str], left: int, found: str) -> None:
    verdict = judge(Evidence(sent=[A], lines=[], states=states, left=left))
    assert not verdict.good
    assert {name: len(getattr(verdict, name)) for name in ("lost", "stuck", "wrong")} == {
        "lost": 0,
        "stuck": 0,
        "wrong": 0,
        found: 1,
    }


def test_a_dead_letter_is_not_good() -> None:
    assert not judge(Evidence(sent=[A], lines=ONCE, states=DONE, dead=1)).good


@pytest.mark.parametrize(
    ("fault", "explains"),
    [
        (None, False),
        (Struck(kind="f", began=1.05, ended=1.06, pids=frozenset([7])), True),
        (Struck(kind="f", began=1.05, ended=1.06, pids=frozenset([8])), False),
        (Struck(kind="f", began=1.05, ended=1.06, workers=frozenset(["w1"])), True),
        (Struck(kind="f", began=1.05, ended=1.06, workers=frozenset(["w2"])), False),
        (Struck(kind="f", began=1.05, ended=1.06), False),
        (Struck(kind="f", began=1.05, ended=1.06, workers=None), True),
        (Struck(kind="f", began=0.6, ended=0.7, workers=None), True),
        (Struck(kind="f", began=0.1, ended=0.2, workers=None), False),
        (Struck(kind="f", began=0.6, ended=0.7, pids=frozenset([7])), False),
        (Struck(kind="f", began=2.1, ended=2.2, workers=None), False),
    ],
)
def test_a_second_start_needs_a_fault_that_struck_the_first(fault: Struck | None, explains: bool) -> None:
    lines = [line("start", 1.0), line("start", 2.0, worker="w2", pid=9), line("end", 2.1, worker="w2", pid=9)]
    verdict = judge(Evidence(sent=[A], lines=lines, states=DONE, faults=[fault] if fault else []))
    assert verdict.good is explains
    assert [again.because for again in verdict.again] == ["f" if explains else ""]
    assert [again.after_end for again in verdict.again] == [False]


@pytest.mark.parametrize(("attempts", "good"), [((2, 1), True), ((1, 2), False)])
def test_what_a_frozen_worker_had_in_hand_it_starts_when_it_wakes_though_another_has_run_it(
    attempts: tuple[int, int], good: bool
) -> None:
    lines = [line("start", 1.0), line("end", 1.1), line("start", 2.0, worker="w2", pid=9)]
    lines[0]["attempt"], lines[2]["attempt"] = attempts
    frozen = Struck(kind="freeze", began=0.6, ended=1.9, workers=frozenset(["w2"]))
    assert judge(Evidence(sent=[A], lines=lines, states=DONE, faults=[frozen])).good is good
    elsewhere = Struck(kind="freeze", began=0.6, ended=1.9, workers=frozenset(["w3"]))
    assert not judge(Evidence(sent=[A], lines=lines, states=DONE, faults=[elsewhere])).good


def test_a_retry_is_no_second_start_and_a_doubled_retry_is_explained_by_what_struck_before_it() -> None:
    lines = [line("start", 1.0), line("start", 2.0, retries=1, worker="w2"), line("start", 2.1, retries=1, worker="w2")]
    killed = Struck(kind="kill", began=1.1, ended=1.2, workers=frozenset(["w1"]))
    assert judge(Evidence(sent=[A], lines=lines[:2], states=DONE)).again == []
    assert judge(Evidence(sent=[A], lines=lines, states=DONE, faults=[killed])).good
    assert not judge(Evidence(sent=[A], lines=lines, states=DONE)).good


def test_what_had_ended_and_runs_again_is_told_apart() -> None:
    lines = [*ONCE, line("start", 2.0, pid=9), line("end", 2.1, pid=9)]
    verdict = judge(Evidence(sent=[A], lines=lines, states=DONE))
    assert [again.after_end for again in verdict.unexplained] == [True]


def test_at_most_once_may_be_lost_and_is_never_repeated() -> None:
    early = Sent(id="a", kind="early", once=True)
    struck = Struck(kind="f", began=1.0, ended=1.1, workers=None)
    assert judge(Evidence(sent=[early], lines=[], states={}, faults=[struck])).lost_at_most_once == 1
    assert judge(Evidence(sent=[early], lines=ONCE[:1], states={"a": "FAILURE"}, faults=[struck])).good
    twice = [line("start", 1.0), line("start", 1.2)]
    assert not judge(Evidence(sent=[early], lines=twice, states=DONE, faults=[struck])).good


@pytest.mark.parametrize(
    ("fault", "good"),
    [
        (Struck(kind="f", began=1.5, ended=1.6, workers=None, deafens=True), True),
        (Struck(kind="f", began=1.5, ended=1.6, workers=None), False),
        (Struck(kind="f", began=2.5, ended=2.6, workers=None, deafens=True), False),
        (Struck(kind="f", began=0.1, ended=0.2, workers=None, deafens=True), False),
    ],
)
def test_at_most_once_is_repeated_only_where_its_acknowledgement_may_not_have_arrived(
    fault: Struck, good: bool
) -> None:
    early = Sent(id="a", kind="early", at=0.5, once=True)
    twice = [*ONCE, line("start", 3.0), line("end", 3.1)]
    assert judge(Evidence(sent=[early], lines=twice, states=DONE, faults=[fault])).good is good


def test_what_kills_itself_explains_its_own_second_start_but_not_one_after_its_end() -> None:
    fatal = Sent(id="a", kind="dying", fatal=True)
    lines = [line("start", 1.0), line("start", 2.0, pid=9), line("end", 2.1, pid=9)]
    assert judge(Evidence(sent=[fatal], lines=lines, states=DONE)).good
    again = [*lines, line("start", 3.0, pid=10)]
    assert not judge(Evidence(sent=[fatal], lines=again, states=DONE)).good


def test_stalls_and_recovery_are_measured() -> None:
    lines = [*ONCE, line("start", 5.1, id="b"), line("end", 5.2, id="b")]
    fault = Struck(kind="f", began=2.0, ended=5.0, workers=None)
    verdict = judge(Evidence(sent=[A], lines=lines, states=DONE, faults=[fault]))
    assert verdict.longest_stall == pytest.approx(4.0)
    assert verdict.longest_stall_calm == pytest.approx(1.0)
    assert verdict.recovery == {"f": pytest.approx(0.1)}
    assert verdict.to_plain()["good"] is True


def test_a_machine_that_stands_still_is_a_fault_that_struck_every_worker() -> None:
    with Watch(3600.0, 1.0) as calm, Watch(0.0, 1.0) as strict:
        (still, *_) = until(lambda: strict.struck, "a gap")
    assert calm.struck == []
    assert still.workers is None
    assert still.ended - still.began > 1.0


def test_the_same_seed_draws_the_same_load_with_everything_in_it() -> None:
    draw = [mixed(random.Random("5:redis"), 2000, Path("/x")) for _ in range(2)]
    assert draw[0] == draw[1]
    assert {call.kind for call in draw[0]} == set(MIX)
    assert mixed(random.Random("6:redis"), 2000, Path("/x")) != draw[0]
