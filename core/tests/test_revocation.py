"""Revoking tasks: what a revocation covers, how workers learn of it, and what becomes of tasks that wait or run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import pytest

from umbel import Umbel, hookimpl
from umbel.capabilities import ResultStoreCapabilities
from umbel.errors import NotSupported, ResultStoreUnavailable, TaskRevoked
from umbel.model import Lease, Message
from umbel.ports.clock import Clock
from umbel.ports.result_store import ClaimStore, ResultStore
from umbel.protocol import make_headers
from umbel.revocation import IDS_KEPT, RULES_KEPT, Revocation, revocations
from umbel.task import Task
from umbel.uplink import UplinkGateway
from umbel.worker import control as control_module
from umbel.worker import revocations as module

from .conftest import MakeApp
from .fakes import Fakes, FakeStore, Running, Shelf, eventually, never, running

NEVER = 1e12


def message(task_id: str = "a", task: str = "shop.job", **headers: Any) -> Message:
    return Message(queue="default", headers={**make_headers(task, task_id, **headers)})


# --- the value ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "covered"),
    [
        ({"ids": ("a", "b")}, True),
        ({"ids": ("b",)}, False),
        ({"task": "shop.job"}, True),
        ({"task": "shop"}, False),
        ({"headers": {"tenant": "acme"}}, True),
        ({"headers": {"tenant": "ac"}}, False),
        ({"headers": {"tenant": ["other", "acme"]}}, True),
        ({"headers": {"number": "7"}}, True),
        ({"headers": {"stamp": "s"}}, True),
        ({"headers": {"marks": "two"}}, True),
        ({"headers": {"absent": "None"}}, False),
        ({"headers": {"root_id": "root"}}, True),
        ({"headers": {"tenant": "acme", "number": 8}}, False),
        ({"task": "shop.job", "headers": {"tenant": "acme"}}, True),
        ({"task": "shop.other", "headers": {"tenant": "acme"}}, False),
    ],
)
def test_what_is_covered(choice: dict[str, Any], covered: bool) -> None:
    """By id, by name, by header or stamp; of what is given together, everything."""
    headers = {"tenant": "acme", "number": 7}
    sent = message(root_id="root", headers=headers, stamps={"stamp": "s", "marks": ["one", "two"]})
    assert Revocation(until=NEVER, **choice).covers(sent) is covered


@pytest.mark.parametrize("choice", [{}, {"ids": ("a",), "task": "t"}, {"task": "t", "grace": -1}])
def test_what_chooses_nothing_or_two_things_is_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Revocation(until=NEVER, **choice)


def test_a_call_is_made_into_revocations_of_bounded_size() -> None:
    ids = [str(n) for n in range(1201)]
    made = revocations([*ids, "0"], task=None, headers=None, terminate=False, grace=5, expires=None, now=100.0)
    assert [task_id for each in made for task_id in each.ids] == ids
    assert {len(each.ids) for each in made} == {500, 201}
    assert {each.until for each in made} == {100 + IDS_KEPT}
    (rule,) = revocations([], task="t", headers=None, terminate=True, grace=5, expires=None, now=100.0)
    assert rule.until == 100 + RULES_KEPT
    for wrong in ({"ids": [""], "expires": None}, {"ids": ["a"], "expires": 0}):
        with pytest.raises(ValueError):
            revocations(task=None, headers=None, terminate=False, grace=5, now=0, **wrong)  # type: ignore[arg-type]  # one of two of its own types


def test_it_travels_as_plain_data_and_is_named_by_what_it_chooses() -> None:
    one = Revocation(until=3.0, task="t", headers={"a": [1]}, terminate=True, grace=0)
    assert Revocation.from_plain(one.to_plain()) == one
    assert attrs.evolve(one, until=4.0, terminate=False).name == one.name
    assert attrs.evolve(one, task="u").name != one.name


def test_taking_back_leaves_the_other_ids() -> None:
    both = Revocation(until=NEVER, ids=("a", "b"))
    assert both.without(Revocation(until=0, ids=("a",))) == attrs.evolve(both, ids=("b",))
    assert both.without(Revocation(until=0, ids=("b", "a", "c"))) is None
    assert both.without(Revocation(until=0, ids=("c",))) is both
    rule = Revocation(until=NEVER, task="t")
    assert both.without(rule) is both
    assert rule.without(Revocation(until=0, task="t")) is None


# --- a store that keeps claims --------------------------------------------------------------------


class KeepingStore(FakeStore, ClaimStore):
    """The fake store with claims, all of one table."""

    capabilities = ResultStoreCapabilities(claim=True)

    def __init__(self, shelf: Shelf, clock: Clock, table: dict[str, Lease]) -> None:
        super().__init__(shelf, clock)
        self.table = table

    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        await self._check()
        held = self.table.get(name)
        if held is not None and held.until > self.clock.time() and held.owner != owner:
            return held
        made = Lease(name=name, owner=owner, fence=1, until=self.clock.time() + lease, value=value or b"")
        self.table[name] = made
        return made

    async def release(self, name: str, owner: str, *, value: bytes | None = None) -> bool:
        await self._check()
        return self.table.pop(name, None) is not None

    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        await self._check()
        now = self.clock.time()
        return [lease for name, lease in self.table.items() if name.startswith(prefix) and lease.until > now]


class Keeping:
    """The plugin that offers it."""

    def __init__(self, fakes: Fakes) -> None:
        self.fakes = fakes
        self.table: dict[str, Lease] = {}

    @hookimpl
    def umbel_make_result_store(self, url: str, clock: Clock) -> ResultStore:
        return KeepingStore(self.fakes.shelf, clock, self.table)


@pytest.fixture
def keeping(fakes: Fakes) -> Keeping:
    return Keeping(fakes)


@pytest.fixture
def app(make_app: MakeApp, keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> Umbel:
    monkeypatch.setattr(module, "_LOOK", 0.002)
    app = make_app({"worker.pool": "manual"}, plugins=[keeping])
    app.task(name="shop.job")(lambda value=None: value)
    return app


@pytest.fixture
def job(app: Umbel) -> Task[..., Any]:
    return app.tasks["shop.job"]


@pytest.fixture
def run(app: Umbel, fakes: Fakes) -> Iterator[Running]:
    with running(app, fakes) as run:
        eventually(lambda: fakes.broker.topics.get(control_module.REQUESTS))
        yield run


def without_broadcast(fakes: Fakes) -> None:
    fakes.broker.capabilities = attrs.evolve(fakes.broker.capabilities, broadcast=False)


# --- before the start -----------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{"task": "shop.job"}, {"headers": {"tenant": "acme"}}, {"ids": ("a", "b")}])
def test_what_is_revoked_while_no_worker_runs_is_never_started(
    app: Umbel, job: Task[..., Any], fakes: Fakes, choice: dict[str, Any]
) -> None:
    """Delivered before the revocation, or sent after it: the mark is in the store."""
    ids = choice.pop("ids", ())
    job.apply_async(task_id="a", headers={"tenant": "acme"})
    assert app.control.revoke(*ids, **choice) is True
    job.apply_async(task_id="b", headers={"tenant": "acme"})
    with running(app, fakes):
        for task_id in "ab":
            with pytest.raises(TaskRevoked):
                app.result(task_id).get(5)
        eventually(lambda: fakes.broker.empty)
    assert fakes.pool.submitted == []
    assert {state for _, state in fakes.shelf.history} == {"REVOKED"}


def test_a_revocation_is_listed_taken_back_and_forgotten_in_time(app: Umbel, job: Task[..., Any], fakes: Fakes) -> None:
    app.control.revoke("a", "b", "c")
    app.control.revoke(task="shop.other", expires=60)
    assert {each.describe() for each in app.control.revoked()} == {"a, b, c", "task shop.other"}
    assert app.control.restore("b") is True
    assert app.control.restore("x") is False
    assert app.control.restore(task="shop.other") is True
    assert [each.ids for each in app.control.revoked()] == [("a", "c")]
    app.control.revoke("d", expires=0.05)
    time.sleep(0.06)
    assert [each.ids for each in app.control.revoked()] == [("a", "c")]


def test_a_running_worker_forgets_what_is_taken_back_and_what_is_over(
    app: Umbel, job: Task[..., Any], fakes: Fakes, run: Running
) -> None:
    app.control.revoke("a", "b")
    eventually(lambda: set(run.worker.operations.revoked) == {"a", "b"})
    app.control.restore("a")
    eventually(lambda: set(run.worker.operations.revoked) == {"b"})
    app.control.revoke(task="shop.job", expires=1.0)
    eventually(lambda: len(run.worker.operations.revocations()) == 2)
    eventually(lambda: len(run.worker.operations.revocations()) == 1)
    job.apply_async(task_id="a")
    fakes.pool.run(fakes.pool.job("a"))
    assert app.result("a").get(5) is None
    assert len(run.worker.operations.revocations()) == 1


def test_what_a_worker_did_not_hear_it_looks_up(
    app: Umbel, job: Task[..., Any], fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a broadcast, or with one that got lost: within the time between two looks. Taken back: likewise."""
    without_broadcast(fakes)
    monkeypatch.setattr(module, "REFRESH", 0.01)
    monkeypatch.setattr(module, "_AGAIN", 0.01)
    with running(app, fakes) as run:
        job.apply_async(task_id="running")
        fakes.pool.job("running")
        assert app.control.revoke("waiting", "running", terminate=True, grace=0) is True
        eventually(lambda: "waiting" in run.worker.operations.revoked)
        with pytest.raises(TaskRevoked):
            app.result("running").get(5)
        app.control.restore("waiting", "running")
        eventually(lambda: not run.worker.operations.revoked)


def test_what_is_said_while_a_worker_looks_is_not_forgotten_by_the_look(
    app: Umbel, run: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look began before it was kept, and ends after it was told."""
    seen = threading.Event()
    release = threading.Event()

    async def slow(store: Any) -> list[Revocation]:
        seen.set()
        await asyncio.to_thread(release.wait, 5)
        return []

    monkeypatch.setattr(module, "kept", slow)
    run.worker.app.runtime.loop.call_soon_threadsafe(run.worker.revocations.look_soon)
    assert seen.wait(5)
    told = Revocation(until=NEVER, ids=("a",))
    run.worker.app.runtime.loop.call_soon_threadsafe(lambda: run.worker.revocations.revoke(told, is_kept=True))
    eventually(lambda: "a" in run.worker.operations.revoked)
    seen.clear()
    release.set()
    assert never(lambda: "a" not in run.worker.operations.revoked)


def test_a_worker_waits_for_a_store_that_is_down_and_then_starts_without(
    app: Umbel, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    monkeypatch.setattr(module, "_AGAIN", 0.01)
    app.control.revoke("a")
    fakes.shelf.down = True
    with running(app, fakes) as run:
        assert "without knowing what is revoked" in caplog.text
        assert not run.worker.operations.revoked
        fakes.shelf.down = False
        eventually(lambda: "a" in run.worker.operations.revoked)


def test_what_a_worker_is_told_by_others_it_keeps_itself(
    app: Umbel, fakes: Fakes, keeping: Keeping, run: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Celery's tools tell it, who know of no store. While that is down it is tried again."""
    monkeypatch.setattr(module, "_AGAIN", 0.01)
    fakes.shelf.down = True
    run.worker.app.runtime.loop.call_soon_threadsafe(run.worker.operations.revoke, ["a"])
    eventually(lambda: "a" in run.worker.operations.revoked)
    assert keeping.table == {}
    fakes.shelf.down = False
    eventually(lambda: keeping.table)
    assert [each.ids for each in app.control.revoked()] == [("a",)]


def test_with_the_store_down_it_is_told_all_the_same_and_the_caller_hears_that_it_is_not_kept(
    app: Umbel, fakes: Fakes, run: Running
) -> None:
    fakes.shelf.down = True
    with pytest.raises(ResultStoreUnavailable):
        app.control.revoke("a")
    eventually(lambda: "a" in run.worker.operations.revoked)


# --- without a store that keeps -------------------------------------------------------------------


def test_without_claims_it_is_told_to_the_workers_and_they_tell_the_next(make_app: MakeApp, fakes: Fakes) -> None:
    first, second = (make_app({"worker.pool": "manual", "worker.name": name}) for name in ("one@here", "two@here"))
    with running(first, fakes) as one:
        eventually(lambda: fakes.broker.topics.get(control_module.REQUESTS))
        assert first.control.revoke("a") is False
        first.control.revoke(task="shop.job", headers={"tenant": 7})
        eventually(lambda: len(one.worker.operations.revocations()) == 2)
        with running(second, fakes) as two:
            eventually(lambda: len(two.worker.operations.revocations()) == 2)
            assert two.worker.operations.revocations() == one.worker.operations.revocations()
    with pytest.raises(NotSupported, match="claims"):
        first.control.revoked()


def test_what_would_reach_nobody_is_refused(make_app: MakeApp, fakes: Fakes) -> None:
    without_broadcast(fakes)
    with pytest.raises(NotSupported, match=r"\[results\] url"):
        make_app().control.revoke("a")


def test_remote_control_can_be_turned_off(make_app: MakeApp, fakes: Fakes) -> None:
    with running(make_app({"worker.control": False}), fakes):
        assert never(lambda: fakes.broker.topics.get(control_module.REQUESTS))


# --- what waits and what runs ---------------------------------------------------------------------


class Stubborn:
    """A pool whose tasks do not answer, but that can kill. Notes what it is asked."""

    def __init__(self, fakes: Fakes) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.heeds = False
        pool, cancel = fakes.pool, fakes.pool.cancel

        async def asked(job_id: int, *, force: bool) -> bool:
            name = next((name for name, job in self.jobs(pool).items() if job.id == job_id), "?")
            self.asked.append((name, force))
            return await cancel(job_id, force=force) if force or self.heeds or job_id in pool.waiting else True

        pool.cancel = asked  # type: ignore[method-assign]  # that is the point

    @staticmethod
    def jobs(pool: Any) -> Mapping[str, Any]:
        with pool.lock:
            jobs = [*pool.busy.values(), *pool.waiting.values()]
        return {Message.from_plain(job.payload[1]).id: job for job in jobs}


def test_what_waits_for_a_slot_is_not_started_and_what_runs_ends_well(
    app: Umbel, job: Task[..., Any], fakes: Fakes
) -> None:
    """Without ``terminate``: the state of what ran is what it returned."""
    fakes.reserve = 5
    with running(app, fakes):
        for task_id in ("one", "two", "waits"):
            job.apply_async(("value",), task_id=task_id)
            fakes.pool.job(task_id)
        stubborn = Stubborn(fakes)
        app.control.revoke("one", "waits")
        with pytest.raises(TaskRevoked, match="revoked"):
            app.result("waits").get(5)
        fakes.pool.run(fakes.pool.job("one"))
        assert app.result("one").get(5) == "value"
    assert stubborn.asked == [("waits", False)]


@pytest.mark.parametrize("heeds", [True, False])
def test_a_running_task_is_asked_to_end_and_then_killed(
    app: Umbel, job: Task[..., Any], fakes: Fakes, heeds: bool
) -> None:
    with running(app, fakes):
        job.apply_async(task_id="other")
        other = job.apply_async(("well",), task_id="a")
        fakes.pool.job("a")
        stubborn = Stubborn(fakes)
        stubborn.heeds = heeds
        app.result("other").revoke(terminate=True, grace=0.05)
        with pytest.raises(TaskRevoked, match="terminated"):
            app.result("other").get(5)
        assert app.result("other").state == "REVOKED"
        fakes.pool.run(fakes.pool.job("a"))
        assert other.get(5) == "well"
    assert stubborn.asked == [("other", False)] + [("other", True)] * (not heeds)


def test_without_grace_it_is_killed_at_once(app: Umbel, job: Task[..., Any], fakes: Fakes, run: Running) -> None:
    handle = job.apply_async(task_id="a")
    fakes.pool.job("a")
    stubborn = Stubborn(fakes)
    handle.cancel(grace=0)
    with pytest.raises(TaskRevoked):
        handle.get(5)
    assert stubborn.asked == [("a", True)]


def test_a_task_that_ends_before_it_is_killed_has_the_result_it_gave(
    app: Umbel, job: Task[..., Any], fakes: Fakes, run: Running
) -> None:
    handle = job.apply_async(("done",), task_id="a")
    waiting = fakes.pool.job("a")
    stubborn = Stubborn(fakes)
    handle.cancel(grace=0.05)
    eventually(lambda: stubborn.asked)
    fakes.pool.run(waiting)
    assert handle.get(5) == "done"
    assert never(lambda: ("a", True) in stubborn.asked, 0.1)


def test_a_task_sees_that_it_is_cancelled_and_chooses_where_to_stop(app: Umbel, fakes: Fakes) -> None:
    """``cancel="flag"``: nothing is raised in it; what it returns stands."""

    @app.task(name="shop.patient", bind=True, cancel="flag")
    def patient(self: Task[..., Any]) -> str:
        assert eventually(self.request.cancelled)
        return "stopped"

    with running(app, fakes):
        eventually(lambda: fakes.broker.topics.get(control_module.REQUESTS))
        handle = patient.apply_async(task_id="a")
        patient_job = fakes.pool.job("a")
        stubborn = Stubborn(fakes)
        asyncio.run(handle.acancel(grace=5))
        fakes.pool.run(patient_job)
        assert handle.get(5) == "stopped"
        assert stubborn.asked == []
    assert patient.request.cancelled() is False


def test_a_task_that_no_pool_can_end_is_told_of(
    app: Umbel, job: Task[..., Any], fakes: Fakes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_ANSWER", 0.01)
    with running(app, fakes):
        handle = job.apply_async(task_id="a")
        running_job = fakes.pool.job("a")

        async def cannot(job_id: int, *, force: bool) -> bool:
            return False

        fakes.pool.cancel = cannot  # type: ignore[method-assign]  # a pool without the ability
        handle.cancel(grace=0.01)
        eventually(lambda: "cannot end it" in caplog.text)
        fakes.pool.run(running_job)
        assert handle.get(5) is None


def test_a_redelivered_message_that_waits_for_its_turn_is_not_started(
    app: Umbel, job: Task[..., Any], fakes: Fakes
) -> None:
    """What may have crashed a worker is started a few at a time: those that wait are not in the pool."""
    fakes.reserve = 5
    for task_id in ("one", "two", "waits"):
        fakes.broker.add(job.message(task_id=task_id)).count = 1
    with running(app, fakes) as run:
        fakes.pool.job("two")
        eventually(lambda: run.worker.intake.waiting)
        app.control.revoke("waits")
        with pytest.raises(TaskRevoked):
            app.result("waits").get(5)
        assert not run.worker.intake.waiting
        assert len(fakes.pool.submitted) == 2


def test_a_worker_that_stops_while_it_ends_a_task_does_not_wait_for_it(
    app: Umbel, job: Task[..., Any], fakes: Fakes
) -> None:
    """The shutdown cancels it too: it is REVOKED, and does not go back to its queue."""
    with running(app, fakes) as run:
        handle = job.apply_async(task_id="a")
        fakes.pool.job("a")
        stubborn = Stubborn(fakes)
        handle.cancel(grace=60)
        eventually(lambda: stubborn.asked)
        run.stop()
        run.stop()
        run.join()
    assert fakes.shelf.state("a") == "REVOKED"
    assert fakes.broker.empty


# --- from a child ---------------------------------------------------------------------------------


def test_a_child_asks_its_parent_and_not_too_often(app: Umbel, run: Running) -> None:
    asked: list[str] = []

    def upcall(verb: str, payload: Any) -> Any:
        asked.append(verb)
        return app.runtime.call(run.worker.gateway.answer(verb, payload))

    child = UplinkGateway(upcall)
    assert child.ask("revoke", (Revocation(until=NEVER, ids=("a",)).to_plain(), 0.0)) is True
    eventually(lambda: "a" in run.worker.operations.revoked)
    assert asyncio.run(child.aask("revoked", None))[0]["ids"] == ["a"]
    asked.clear()
    assert [child.cancelled("a") for _ in range(50)] == [False] * 50
    assert len(asked) == 1
    run.worker.gateway.is_cancelled = lambda task_id: task_id == "b"
    assert child.cancelled("b") is True
