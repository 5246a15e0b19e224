"""Schedulers and the API in one process: what is declared, made, changed, and what comes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest
from cluster import Cluster, until
from schedule_site import Counted, Site

from umbel import Umbel, hookimpl
from umbel.errors import (
    NotSupported,
    ResultStoreUnavailable,
    ScheduleRefused,
    SchedulerUnavailable,
    SettingsError,
    UmbelError,
    UnknownSchedule,
)
from umbel.model import Lease, ScheduleEntry
from umbel.ports.timetable import Timetable
from umbel.scheduling.runs import HEADER_COPY, HEADER_DUE, run_message
from umbel.scheduling.terms import run_id
from umbel.scheduling.timetables import Every

# --- declaring and reconciling --------------------------------------------------------------------


def test_what_is_declared_runs(make: Callable[..., Site]) -> None:
    site = make(schedules={"in settings": {"task": "note", "every": "200ms", "args": ["a"], "kwargs": {}}})
    site.app.schedule(site.app.tasks["note"], "in code", every=0.2, kwargs={"what": "b"})

    @site.app.schedule(every=0.2)
    @site.app.task(name="decorated")
    def decorated() -> None:
        site.starts.append(("c", "", 0))

    with site.working():
        for what in "abc":
            site.wait(what, 3)
    entries = {entry.name: entry for entry in site.app.schedules.list()}
    assert entries.keys() == {"in settings", "in code", "decorated"}
    assert set(site.said("a")) <= {run_id("in settings", slot / 5) for slot in range(int(time.time()) * 5 + 5)[-200:]}
    assert len(set(site.said("a"))) == len(site.said("a"))


def test_declarations_are_reconciled_by_name(make: Callable[..., Site]) -> None:
    every = {"task": "note", "every": 3600}
    first = make(schedules={"same": every, "gone": every, "changed": every, "held": every})
    first.app.schedules.create("own", "note", every=3600)

    async def reconcile(site: Site) -> tuple[Sequence[str], Sequence[str]]:
        return await site.app.schedules.reconcile()

    assert sorted(asyncio.run(reconcile(first))[0]) == ["changed", "gone", "held", "same"]
    first.app.schedules.pause("held")
    before = {entry.name: entry for entry in first.app.schedules.list()}
    second = make(schedules={"same": every, "held": {**every, "args": ["x"]}, "changed": {**every, "every": 1800}})
    assert [sorted(names) for names in asyncio.run(reconcile(second))] == [["changed", "held"], ["gone"]]
    after = {entry.name: entry for entry in second.app.schedules.list()}
    assert after.keys() == {"same", "changed", "held", "own"}
    assert after["same"].revision == before["same"].revision
    assert after["changed"].schedule["when"] == {"every": 1800.0}
    assert (after["held"].enabled, after["held"].args) == (False, ("x",))
    assert asyncio.run(reconcile(second)) == ([], [])


def test_a_declaration_that_is_wrong_is_told_at_the_start_with_all_others(make: Callable[..., Site]) -> None:
    site = make(
        schedules={
            "a": {"task": "note", "crontab": "61 * * * *"},
            "b": {"task": "note", "when": {"moon": "full"}},
            "c": {"task": "quiet", "every": 1, "overlap": "skip"},
            "d": {"task": "note", "every": 1, "options": {"task_id": "x"}},
            "e": {"task": "note", "every": 1, "options": {"colour": "x"}},
        }
    )
    site.app.schedule("note", "a", every=1)
    with pytest.raises(SettingsError) as told:
        site.app.worker().make_steps()
    reasons = (
        "[schedules.a] is declared in code too",
        "'a': 61 is no minute",
        "no timetable is made of 'moon'",
        "task 'quiet' stores no result: take its ignore_result away",
        "options may not have task_id",
        "a call has no option 'colour'",
    )
    for reason in reasons:
        assert any(reason in problem for problem in told.value.problems), (reason, told.value.problems)
    with pytest.raises(ScheduleRefused, match="'a' is declared twice"):
        site.app.schedule("note", "a", every=1)


def test_a_run_has_a_record_from_its_sending_on_where_tasks_have_one(make: Callable[..., Site]) -> None:
    site = make(
        results__track="submit", schedules={"e": {"task": "note", "every": 0.2, "options": {"countdown": 3600}}}
    )
    with site.working():
        until(lambda: [e for e in site.app.schedules.list() if e.total_runs], "a run is sent")
        entry = site.app.schedules.get("e")
        assert site.app.result(run_id("e", entry.last_sent or 0.0)).state == "PENDING"


# --- the API --------------------------------------------------------------------------------------


def test_entries_are_made_changed_and_removed_while_a_scheduler_runs(make: Callable[..., Site]) -> None:
    site = make()
    schedules = site.app.schedules
    with site.working():
        schedules.create("e", site.app.tasks["note"], every=0.2, args=["a"])
        site.wait("a", 2)
        schedules.change("e", args=["b"])
        site.wait("b", 2)
        schedules.pause("e")
        time.sleep(1)  # what was under way has come
        so_far = len(site.starts)
        assert not schedules.get("e").enabled
        time.sleep(0.6)
        assert len(site.starts) == so_far
        triggered = schedules.trigger("e")
        assert triggered.get(timeout=30) is None
        assert site.said("b")[-1] == triggered.id
        assert schedules.resume("e").enabled
        site.wait("b", len(site.said("b")) + 2)
        schedules.delete("e")
        time.sleep(1)  # what was under way has come
        so_far = len(site.starts)
        time.sleep(0.5)
        assert len(site.starts) == so_far
    assert list(schedules.list()) == []


def test_the_awaitable_twins(make: Callable[..., Site]) -> None:
    site = make()

    async def main() -> None:
        schedules = site.app.schedules
        await schedules.acreate("e", "note", crontab="@daily", timezone="Asia/Seoul")
        await schedules.achange("e", crontab="0 5 * * *")
        assert [entry.name for entry in await schedules.alist()] == ["e"]
        assert not (await schedules.apause("e")).enabled
        assert (await schedules.aresume("e")).enabled
        first, second = await schedules.anext("e", 2)
        assert second - first == 86_400
        assert (await schedules.atrigger("e")).id
        assert await schedules.aleader() is None
        await schedules.adelete("e")
        with pytest.raises(UnknownSchedule, match="umbel schedule list"):
            await schedules.aget("e")

    asyncio.run(main())
    site.app.close()


def test_what_cannot_be_is_refused(make: Callable[..., Site]) -> None:
    site = make(schedules={"declared": {"task": "note", "every": 60, "enabled": False}})
    schedules = site.app.schedules
    asyncio.run(schedules.reconcile())
    schedules.create("e", "note", every=60)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("there is a schedule 'e' already", lambda: schedules.create("e", "note", every=60)),
        ("needs one of crontab, every, at or when, and has none", lambda: schedules.create("f", "note")),
        ("has crontab and every", lambda: schedules.create("f", "note", every=1, crontab="@daily")),
        ("would never be due", lambda: schedules.create("f", "note", at="2001-01-01")),
        ("'Mars' is no time zone", lambda: schedules.create("f", "note", crontab="@daily", timezone="Mars")),
        ("cannot be stored|cannot be sent", lambda: schedules.create("f", "note", every=1, args=[object()])),
        ("has no colour", lambda: schedules.change("e", colour="red")),
        ("its name must be printable", lambda: schedules.create("\n", "note", every=1)),
        ("can only be changed there; pause it", lambda: schedules.change("declared", every=5)),
        ("can only be deleted there", lambda: schedules.delete("declared")),
        ("is switched off: set enabled = true where", lambda: schedules.resume("declared")),
    ]
    for reason, call in cases:
        with pytest.raises(ScheduleRefused, match=reason):
            call()
    with pytest.raises(UnknownSchedule, match="there is no schedule 'none'"):
        schedules.pause("none")
    site.app.close()


def test_a_change_keeps_the_record_and_what_is_not_named(make: Callable[..., Site]) -> None:
    site = make()
    made = site.app.schedules.create("e", "note", at=["2090-01-01", "2091-01-01"], jitter="5s", options={"priority": 3})
    changed = site.app.schedules.change("e", max_runs=1, task="slow")
    assert (changed.task, changed.options, changed.next_due) == ("slow", {"priority": 3}, made.next_due)
    assert changed.schedule["jitter"] == 5.0
    assert changed.schedule["when"] == made.schedule["when"]
    assert site.app.schedules.change("e", every="1h").schedule["when"] == {"every": 3600.0}
    assert len(site.app.schedules.next("e", 9)) == 1
    site.app.close()


def test_without_results_nobody_can_tell_of_overlaps(url: str) -> None:
    app = Umbel("s", broker=url, settings={"results.url": "disabled"})
    with pytest.raises(
        NotSupported, match=r'schedule \'e\' has overlap = \'queue\'.*\[results\] url, which is "disabled"'
    ):
        app.schedules.create("e", "note", every=1, overlap="queue")
    app.close()


def test_where_schedules_are_kept(url: str) -> None:
    def address(**settings: Any) -> tuple[str, str]:
        app = Umbel("s", settings={key.replace("__", "."): value for key, value in settings.items()})
        found = app.schedules.address()
        return found.url, found.origin

    results, broker = f"{url}r", f"{url}b"
    assert address(broker__url=broker, results__url=results) == (results, "[results] url")
    assert address(broker__url=broker, results__url="rpc://") == (broker, "[broker] url")
    assert address(broker__url=broker, results__url="disabled") == (broker, "[broker] url")
    assert address(broker__url=broker, scheduler__url=url) == (url, "[scheduler] url")
    with pytest.raises(SettingsError, match=r"set \[scheduler\] url to one of .*sqlite"):
        address(broker__url="amqp://x", results__url="rpc://")


# --- overlap --------------------------------------------------------------------------------------


def test_skip(make: Callable[..., Site]) -> None:
    site = make(schedules={"e": {"task": "slow", "every": 0.2, "overlap": "skip"}})
    with site.working():
        site.wait("slow")
        time.sleep(0.8)
        assert len(site.said("slow")) == 1
        site.gate.set()
        site.wait("slow", 2)


def test_queue(make: Callable[..., Site]) -> None:
    site = make(schedules={"e": {"task": "slow", "every": 0.2, "overlap": "queue", "max_runs": 3, "catch_up": "all"}})
    with site.working():
        site.wait("slow")
        time.sleep(0.8)
        assert len(site.said("slow")) == 1
        site.gate.set()
        site.wait("slow", 3)
    (entry,) = site.app.schedules.list()
    assert (entry.total_runs, entry.next_due) == (3, None)


def test_cancel_old(make: Callable[..., Site]) -> None:
    site = make(schedules={"e": {"task": "slow", "every": 1.0, "overlap": "cancel_old", "max_runs": 2}})
    with site.working():
        site.wait("slow", 2)
        old, new = site.said("slow")
        # Its thread wakes when the gate is opened, and finds TaskCancelled.
        site.gate.set()
        until(lambda: site.app.result(old).state == "REVOKED", "the old run is revoked", timeout=15)
    assert site.app.result(new).id == new


# --- faults ---------------------------------------------------------------------------------------


def test_an_entry_that_cannot_be_sent_stops_no_other(make: Callable[..., Site]) -> None:
    class Moons(Timetable):
        def next_after(self, moment: float) -> float | None:
            raise ZeroDivisionError("no moon")

    class Plugin:
        @hookimpl
        def umbel_make_timetable(self, schedule: Mapping[str, Any]) -> Timetable | None:
            return Moons() if "moon" in schedule else Every(0.2) if "star" in schedule else None

    site = make([Plugin()])
    store = site.app.schedules.make_store()
    past = time.time() - 5
    bad = [
        ScheduleEntry(name="when", task="note", schedule={"when": {"sun": 1}}, next_due=past),
        ScheduleEntry(name="terms", task="note", schedule={"lunar": 1}, next_due=past),
        ScheduleEntry(name="moon", task="note", schedule={"when": {"moon": 1}}, next_due=past),
        ScheduleEntry(
            name="refused",
            task="note",
            schedule={"when": {"every": 0.2}, "since": past},
            options={"exchange": "nowhere"},
            next_due=past,
        ),
    ]
    asyncio.run(store.upsert(bad))
    site.app.schedules.create("good", "note", when={"star": 1}, args=["good"])
    with site.working():
        site.wait("good", 5)
        found = {entry.name: entry for entry in site.app.schedules.list()}
    assert "no timetable is made of 'sun'" in found["when"].problem
    assert "which this umbel-core does not know" in found["terms"].problem
    assert found["moon"].problem == "ZeroDivisionError: no moon"
    assert "nowhere" in found["refused"].problem
    assert found["good"].problem == ""
    assert len(set(site.said("good"))) == len(site.said("good"))


def test_a_run_whose_publishing_was_in_doubt_starts_once(make: Callable[..., Site]) -> None:
    broker = Counted(doubts=4)
    site = make([broker], schedules={"e": {"task": "note", "every": 0.4, "args": ["x"], "catch_up": "all"}})
    with site.working():
        until(lambda: not broker.doubts and len(set(site.said("x"))) > 5, "it goes on", timeout=20)
        time.sleep(0.3)
    assert max(broker.taken.values()) > 1
    assert len(site.said("x")) == len(set(site.said("x")))
    (entry,) = site.app.schedules.list()
    slots = [run_id("e", round(entry.schedule["since"] // 0.4 * 0.4 + 0.4 * n, 6)) for n in range(60)]
    assert set(site.said("x")) <= set(slots)
    assert entry.total_runs == len(set(site.said("x")))


def test_copies_of_one_run_start_once_but_retries_and_redeliveries_do_start(make: Callable[..., Site]) -> None:
    site = make(worker__with_scheduler=False)
    entry = ScheduleEntry(name="e", task="twice", schedule={})
    copies = [run_message(site.app, entry, 10.0) for _ in range(5)]
    assert len({message.id for message in copies}) == 1
    assert len({message.headers[HEADER_COPY] for message in copies}) == 5
    assert copies[0].headers[HEADER_DUE] == "1970-01-01T00:00:10+00:00"
    with site.working():
        site.app.client.send(copies)
        site.wait("twice", 2)
        time.sleep(0.3)
        assert len(site.said("twice")) == 2, "once, and its retry"
        site.app.client.send([copies[0]])  # as if it came again: it has its own number
        site.wait("twice", 3)


def test_what_a_former_leader_has_sent_and_not_marked_starts_once(make: Callable[..., Site]) -> None:
    usurper = Counted(late=3)
    site = make([usurper], schedules={"e": {"task": "note", "every": 0.3, "args": ["x"], "catch_up": "all"}})
    with site.working():
        site.wait("x", 6)
        time.sleep(0.3)
    assert usurper.late == 0
    assert len(site.said("x")) == len(set(site.said("x")))
    (entry,) = site.app.schedules.list()
    assert entry.total_runs == len(site.said("x"))


def test_an_overlap_policy_that_can_be_kept_no_more_is_told(url: str) -> None:
    before = Site(url, {})
    before.app.schedules.create("e", "note", every=0.2, overlap="skip")
    before.app.schedules.create("good", "note", every=0.2, args=["good"])
    site = Site(url, {"results.url": "disabled", "scheduler.url": url})
    with site.working():
        site.wait("good", 3)
        problem = site.app.schedules.get("e").problem
    assert 'set [results] url, which is "disabled"' in problem
    assert site.said("") == []


IN_A_CHILD = """
from umbel import Umbel

app = Umbel("child")

@app.task
def plan(name):
    made = app.schedules.create(name, "child.plan", every="1h", args=["again"])
    app.schedules.pause(name)
    return [made.next_due is not None, [entry.name for entry in app.schedules.list()], app.schedules.get(name).enabled]
"""


def test_a_task_in_a_child_process_makes_entries_through_its_worker(cluster: Cluster) -> None:
    (cluster.folder / "child.py").write_text(IN_A_CHILD)
    cluster.configure(app="child", worker__concurrency=1)
    cluster.worker()
    assert cluster.app.send_task("child.plan", ["made by a task"]).get(timeout=20) == [True, ["made by a task"], False]


class Speechless:
    """Makes the result store say nothing about claims for a while."""

    def __init__(self) -> None:
        self.silent = 2

    @hookimpl(wrapper=True)
    def umbel_make_result_store(self) -> Any:
        store: Any = yield
        claim = store.claim

        async def claimed(name: str, owner: str, **more: Any) -> Lease:
            if name.startswith("umbel-run:") and self.silent:
                self.silent -= 1
                raise ResultStoreUnavailable("no answer")
            return cast("Lease", await claim(name, owner, **more))

        store.claim = claimed
        return store


def test_a_run_waits_until_the_store_can_say_that_it_is_the_only_one(make: Callable[..., Site]) -> None:
    store = Speechless()
    site = make([store], worker__with_scheduler=False)
    entry = ScheduleEntry(name="e", task="note", schedule={}, args=("x",))
    with site.working():
        site.app.client.send([run_message(site.app, entry, 10.0) for _ in range(2)])
        site.wait("x")
        time.sleep(0.2)
        assert site.app.result(site.said("x")[0]).get(timeout=30) is None
    assert store.silent == 0
    assert len(site.said("x")) == 1


class Dumb:
    """Makes a store say nothing to some calls for a while."""

    def __init__(self, **silent: int) -> None:
        self.silent = silent
        """Calls by name, and how many of each."""

    def strike(self, store: Any, error: UmbelError) -> Any:
        for name in self.silent:
            setattr(store, name, self._striking(name, getattr(store, name), error))
        return store

    def _striking(self, name: str, call: Callable[..., Any], error: UmbelError) -> Callable[..., Any]:
        async def struck(*arguments: Any, **more: Any) -> Any:
            if self.silent[name]:
                self.silent[name] -= 1
                raise error
            return await call(*arguments, **more)

        return struck


class DumbScheduler(Dumb):
    @hookimpl(wrapper=True)
    def umbel_make_scheduler(self) -> Any:
        return self.strike((yield), SchedulerUnavailable("no answer"))


class DumbResults(Dumb):
    @hookimpl(wrapper=True)
    def umbel_make_result_store(self) -> Any:
        return self.strike((yield), ResultStoreUnavailable("no answer"))


def test_a_store_of_entries_that_does_not_answer_is_waited_for(make: Callable[..., Site]) -> None:
    store = DumbScheduler(lead=2, due=2, mark=2, load=1)
    site = make([store], schedules={"e": {"task": "note", "every": 0.2, "args": ["x"], "catch_up": "all"}})
    with site.working():
        site.wait("x", 4)
        until(lambda: not any(store.silent.values()), "it has been silent as often as it was to be")
        site.wait("x", len(site.said("x")) + 2)
    assert len(site.said("x")) == len(set(site.said("x")))


def test_only_who_asks_the_results_waits_for_them(make: Callable[..., Site]) -> None:
    store = DumbResults(get=1_000_000)
    every = {"task": "note", "every": 0.2, "catch_up": "all"}
    site = make(
        [store], schedules={"asks": {**every, "args": ["asks"], "overlap": "skip"}, "e": {**every, "args": ["x"]}}
    )
    with site.working():
        site.wait("asks")
        until(lambda: store.silent["get"] < 1_000_000, "it has asked in vain")
        site.wait("x", len(site.said("x")) + 10)
        assert len(site.said("asks")) == 1
        store.silent["get"] = 0
        site.wait("asks", 2)
