"""Runs of tasks that are unique: what becomes of a run whose key another call holds, and of the key where a run is sent twice."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from cluster import until
from schedule_site import Counted, Site

from umbel import Umbel
from umbel.claiming import UNIQUE, claims
from umbel.errors import DuplicateTask, ScheduleRefused
from umbel.model import ScheduleEntry
from umbel.result import NotSent
from umbel.scheduling.runs import plan_of, run_message
from umbel.scheduling.terms import run_id
from umbel.unique import HEADER, send

Make = Callable[..., Site]


def single(site: Site, seconds: float | None = None, **options: Any) -> None:
    """A task ``single`` that runs until the gate is open, or for some time."""

    @site.app.task(name="single", bind=True, **{"unique": "until_done", **options})
    def single(task: Any) -> None:
        site.starts.append(("single", task.request.id, time.time()))
        if seconds is None:
            site.gate.wait(20)
        else:
            time.sleep(seconds)
        site.starts.append(("end", task.request.id, time.time()))


def held(site: Site) -> list[str]:
    """Owners of unique keys."""
    return [claim.owner for claim in claims(site.app.gateway, UNIQUE)]


def test_a_run_whose_key_another_call_holds_is_passed_over(make: Make) -> None:
    site = make(
        schedules={
            "e": {"task": "single", "every": 0.2},
            "good": {"task": "note", "every": 0.2, "args": ["good"]},
        },
    )
    single(site)
    other = site.app.tasks["single"].delay()
    with site.working():
        site.wait("good", 4)
        assert site.said("single") == [other.id]
        entry = site.app.schedules.get("e")
        assert (entry.total_runs, entry.last_sent, entry.problem) == (0, None, "")
        assert entry.last_due is not None
        site.gate.set()
        site.wait("single", 3)
    entry = site.app.schedules.get("e")
    ids = site.said("single")[1:]
    assert entry.total_runs in (len(ids), len(ids) + 1), "what was sent last may not have begun"
    assert len(set(ids)) == len(ids)


def test_a_run_is_not_sent_beside_the_earlier_one(make: Make) -> None:
    site = make(schedules={"e": {"task": "single", "every": 0.1, "catch_up": "all"}})
    single(site, 0.35)
    with site.working():
        site.wait("single", 3)
    ends = {task_id: at for what, task_id, at in site.starts if what == "end"}
    starts = [(task_id, at) for what, task_id, at in site.starts if what == "single"]
    for (before, _), (_, at) in itertools.pairwise(starts):
        assert at >= ends[before]


def test_a_queued_run_waits_for_the_earlier_one_of_its_key(make: Make) -> None:
    site = make(schedules={"e": {"task": "single", "every": 0.2, "overlap": "queue", "max_runs": 3, "catch_up": "all"}})
    single(site)
    with site.working():
        site.wait("single")
        time.sleep(0.5)
        assert len(site.said("single")) == 1
        site.gate.set()
        site.wait("single", 3)
    entry = site.app.schedules.get("e")
    first = entry.last_sent - 0.4 if entry.last_sent is not None else 0.0
    assert site.said("single") == [run_id("e", round(first + 0.2 * n, 6)) for n in range(3)], "no slot is passed over"


def test_a_run_that_ends_the_earlier_one_takes_its_key(make: Make) -> None:
    site = make(schedules={"e": {"task": "single", "every": 1.0, "overlap": "cancel_old", "max_runs": 2}})
    single(site)
    with site.working():
        site.wait("single")
        old = site.said("single")[0]
        until(lambda: site.app.control.revoked(), "the old run is revoked")
        site.gate.set()  # its thread wakes, and finds TaskCancelled
        site.wait("single", 2)
        until(lambda: site.app.result(old).state == "REVOKED", "the old run is revoked")
    assert site.app.schedules.get("e").total_runs == 2


def test_a_run_takes_the_place_of_one_that_waits(make: Make) -> None:
    site = make(
        schedules={
            "e": {"task": "single", "every": 0.3, "max_runs": 3, "options": {"countdown": 1.5}, "catch_up": "all"}
        }
    )
    single(site, 0.0, unique="until_start", on_conflict="replace")
    with site.working():
        site.wait("single")
        entry = site.app.schedules.get("e")
        assert (entry.total_runs, entry.next_due) == (3, None)
        assert site.said("single") == [run_id("e", entry.last_sent or 0.0)]
        first = run_id("e", round((entry.last_sent or 0.0) - 0.6, 6))
        assert site.app.result(first).state == "REVOKED"


def test_a_debounced_task_runs_once_for_all_slots_of_a_burst(make: Make) -> None:
    site = make(schedules={"e": {"task": "single", "every": 0.2, "max_runs": 4}})
    single(site, 0.0, unique=None, debounce=1.0)
    with site.working():
        site.wait("single")
        entry = site.app.schedules.get("e")
        assert site.said("single") == [run_id("e", entry.last_sent or 0.0)]
        assert entry.total_runs == 4


def test_an_entry_may_say_that_its_runs_are_not_unique(make: Make) -> None:
    site = make(schedules={"e": {"task": "single", "every": 0.2, "options": {"unique": None}}})
    single(site)
    with site.working():
        site.wait("single", 3)
        assert held(site) == []


def test_trigger_asks_too(make: Make) -> None:
    site = make(worker__with_scheduler=False)
    single(site)
    site.app.schedules.create("e", "single", every=3600)
    with site.working():
        first = site.app.schedules.trigger("e")
        site.wait("single")
        second = site.app.schedules.trigger("e")
        assert isinstance(second, NotSent)
        assert second.existing == first
        with pytest.raises(DuplicateTask):
            second.get()


def test_a_store_without_claims_is_told(make: Make, url: str) -> None:
    site = make(results__url="disabled", scheduler__url=url)
    single(site, 0.0)
    with pytest.raises(ScheduleRefused, match="there is no result store"):
        site.app.schedules.create("e", "single", every=1)
    site.app.close()


def test_options_that_say_nothing_are_refused(make: Make) -> None:
    site = make()
    with pytest.raises(ScheduleRefused, match="give unique, debounce or throttle beside on_conflict"):
        site.app.schedules.create("e", "note", every=1, options={"on_conflict": "drop"})
    site.app.close()


# --- runs that are sent twice ---------------------------------------------------------------------


def test_a_run_in_doubt_starts_once_and_leaves_no_key(make: Make) -> None:
    counted = Counted(doubts=3)
    site = make([counted], schedules={"e": {"task": "single", "every": 0.3, "catch_up": "all", "max_runs": 5}})
    single(site, 0.0)
    with site.working():
        until(lambda: not counted.doubts and len(set(site.said("single"))) >= 2, "it goes on")
        until(lambda: site.app.schedules.get("e").next_due is None, "it has run as often as it may")
        until(lambda: not held(site), "all keys are free")
    assert len(site.said("single")) == len(set(site.said("single")))


def test_what_a_former_leader_has_sent_and_a_worker_runs_is_not_sent_again(make: Make) -> None:
    counted = Counted(late=2)
    site = make([counted], schedules={"e": {"task": "single", "every": 0.3, "max_runs": 1, "catch_up": "all"}})
    single(site)
    with site.working():
        until(lambda: [e for e in site.app.schedules.list() if e.total_runs == 1], "it is marked")
        (owner,) = held(site)
        assert site.said("single") == [owner]
        assert counted.taken[owner] == 1
        assert counted.late == 0


def test_a_copy_of_a_run_frees_no_key(make: Make) -> None:
    site = make(worker__with_scheduler=False)
    single(site)
    entry = ScheduleEntry(name="e", task="single", schedule={})
    app: Umbel = site.app
    plan = plan_of(app, entry)
    assert plan is not None
    with site.working():
        first = run_message(app, entry, 10.0)
        assert send(app, plan, first, None) == first.id
        site.wait("single")
        copy = run_message(app, entry, 10.0)
        copy.headers[HEADER] = [plan.name, "until_done"]  # type: ignore[index]  # a message of our own
        app.client.send([copy])
        until(lambda: (site.depth().ready, site.depth().leased) == (0, 1), "the copy is settled")
        assert held(site) == [first.id]
        assert not app.tasks["single"].delay().sent
        site.gate.set()
        until(lambda: not held(site), "the key is free")
    assert site.said("single") == [first.id]
