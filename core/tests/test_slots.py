"""Slots of a key on a worker: taken, kept, passed on, given up, and what happens when the store or a lease fails."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from umbel import Umbel
from umbel.errors import NotSupported
from umbel.model import Action, Ending, Lease, Message
from umbel.protocol import make_headers
from umbel.task import Task
from umbel.worker import slots

from .claims import Claiming
from .conftest import MakeApp
from .fakes import Fakes, Running, eventually, never, running

SETTINGS = {"worker.pool": "manual", "worker.concurrency": 4}
LONG = 60.0
long_leases = pytest.mark.parametrize("lease", [LONG], indirect=True)
"""For what is about the time between two calls: no lease ends meanwhile, however slow the machine is."""


@pytest.fixture
def claiming(fakes: Fakes) -> Claiming:
    return Claiming(fakes)


@pytest.fixture
def lease(request: pytest.FixtureRequest) -> float:
    return float(getattr(request, "param", 0.6))


@pytest.fixture
def app(make_app: MakeApp, claiming: Claiming, lease: float) -> Umbel:
    return make_app({**SETTINGS, "broker.lease": lease}, plugins=[claiming])


@pytest.fixture
def job(app: Umbel) -> Task[..., Any]:
    return app.task(name="shop.job", concurrency_limit=1, concurrency_key="{tenant}")(lambda tenant, n=0: n)


@pytest.fixture
def run(app: Umbel, job: Task[..., Any], fakes: Fakes) -> Iterator[Running]:
    with running(app, fakes) as run:
        yield run


def held(claiming: Claiming) -> list[str]:
    return sorted(name for name in claiming.claims.live() if name.startswith("limit:"))


def take_over(claiming: Claiming, name: str = "limit:shop.job:a:0", seconds: float = 60.0) -> None:
    """Another worker has the slot."""
    claiming.claims.leases[name] = Lease(name=name, owner="other", fence=9, until=time.time() + seconds)


def test_a_slot_is_held_while_its_call_runs_and_given_up_when_it_is_settled(
    run: Running, job: Task[..., Any], fakes: Fakes, claiming: Claiming
) -> None:
    sent = job.delay("a")
    fakes.pool.job(sent.id)
    assert held(claiming) == ["limit:shop.job:a:0"]
    assert run.worker.operations.stats()["limit_slots"] == {"shop.job": 1}
    assert never(lambda: not held(claiming), 1.0)  # longer than its lease: it is renewed
    fakes.pool.run(fakes.pool.job(sent.id))
    eventually(lambda: not held(claiming))
    assert run.worker.slots.held == {}


@long_leases
def test_the_next_of_its_key_gets_the_slot_without_a_word_to_the_store(
    run: Running, job: Task[..., Any], fakes: Fakes, claiming: Claiming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_IN_HAND", LONG)
    first, second = job.delay("a"), job.delay("a")
    fakes.pool.job(first.id)
    eventually(lambda: any(place.waiting for place in run.worker.slots._places.values()))
    claiming.claims.calls.clear()
    fakes.pool.run(fakes.pool.job(first.id))
    fakes.pool.run(fakes.pool.job(second.id))
    assert "claim" not in claiming.claims.calls
    eventually(lambda: not held(claiming))


def test_what_waits_too_long_goes_back_uncounted_and_behind_long_calls_nothing_waits(
    run: Running, job: Task[..., Any], fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.broker.pace = 0.01
    first, second = job.delay("a"), job.delay("a")
    fakes.pool.job(first.id)
    back = eventually(lambda: [s for s in fakes.broker.settlements if s.action is Action.REQUEUE])
    assert {s.delivery.message.id for s in back} == {second.id}
    assert all(not s.counted and 0 < s.delay <= 5 for s in back)
    time.sleep(0.3)
    fakes.pool.run(fakes.pool.job(first.id))
    fakes.pool.run(fakes.pool.job(second.id))
    job.map_delay([("a",), ("a",)])
    for _ in range(2):
        waiting = eventually(lambda: next(iter(fakes.pool.busy.values()), None))
        assert run.worker.slots._held_for["shop.job"] > slots._IN_HAND
        assert never(lambda: any(place.waiting for place in run.worker.slots._places.values()))
        fakes.pool.run(waiting)


def test_another_key_does_not_wait(run: Running, job: Task[..., Any], fakes: Fakes) -> None:
    first, second = job.delay("a"), job.delay("b")
    assert fakes.pool.job(first.id).id != fakes.pool.job(second.id).id


@pytest.mark.parametrize("limit", [2, 12])
def test_a_slot_that_another_worker_holds_is_not_taken(
    app: Umbel, fakes: Fakes, claiming: Claiming, limit: int
) -> None:
    job = app.task(name="shop.job", concurrency_limit=limit)(lambda: 1)
    for index in range(limit - 1):
        take_over(claiming, f"limit:shop.job::{index}")
    with running(app, fakes):
        job.map_delay([()] * 3)
        eventually(lambda: fakes.pool.busy)
        assert never(lambda: len(fakes.pool.busy) > 1, 0.2)


@pytest.mark.parametrize("fate", [Ending.LOST, Ending.RETURNED, Ending.CANCELLED])
def test_a_call_that_does_not_end_well_gives_its_slot_up(
    run: Running, job: Task[..., Any], fakes: Fakes, claiming: Claiming, fate: Ending
) -> None:
    fakes.broker.pace = 100
    fakes.pool.end(fakes.pool.job(job.delay("a").id), fate)
    eventually(lambda: fakes.broker.settlements)
    if fate is Ending.LOST:  # it comes again after a pause; the others at once
        eventually(lambda: not held(claiming))


def test_a_revoked_call_that_waits_for_a_slot_takes_none(
    run: Running, job: Task[..., Any], fakes: Fakes, claiming: Claiming
) -> None:
    first, second = job.delay("a"), job.delay("a")
    fakes.pool.job(first.id)

    async def revoke() -> None:
        run.worker.operations.revoke([second.id])

    run.worker.app.runtime.call(revoke())
    fakes.pool.run(fakes.pool.job(first.id))
    eventually(lambda: fakes.shelf.state(second.id) == "REVOKED")
    eventually(lambda: not held(claiming))
    assert run.worker.slots.held == {}


def test_a_revoked_call_that_waits_here_does_not_wait_for_its_slot(
    run: Running, job: Task[..., Any], fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_IN_HAND", LONG)
    first, second = job.delay("a"), job.delay("a")
    fakes.pool.job(first.id)
    eventually(lambda: any(place.waiting for place in run.worker.slots._places.values()))

    async def revoke() -> None:
        run.worker.operations.revoke([second.id])

    run.worker.app.runtime.call(revoke())
    eventually(lambda: fakes.shelf.state(second.id) == "REVOKED")
    assert fakes.shelf.state(first.id) is None
    fakes.pool.run(fakes.pool.job(first.id))


@long_leases
def test_a_slot_that_was_kept_for_a_moment_is_used_again_or_given_up(
    run: Running, job: Task[..., Any], fakes: Fakes, claiming: Claiming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_SHORT", LONG)
    monkeypatch.setattr(slots, "_SPARE", LONG)
    fakes.pool.run(fakes.pool.job(job.delay("a").id))
    eventually(lambda: any(place.spare for place in run.worker.slots._places.values()))
    claiming.claims.calls.clear()
    second = fakes.pool.job(job.delay("a").id)
    monkeypatch.setattr(slots, "_SPARE", 0.01)
    fakes.pool.run(second)
    assert "claim" not in claiming.claims.calls
    eventually(lambda: not held(claiming))
    eventually(lambda: claiming.claims.calls.count("release") == 1)


def test_a_slot_that_has_passed_to_another_ends_its_call_and_the_call_goes_back(
    run: Running, job: Task[..., Any], fakes: Fakes, claiming: Claiming, caplog: pytest.LogCaptureFixture
) -> None:
    sent = job.delay("a")
    fakes.pool.job(sent.id)
    take_over(claiming)
    eventually(lambda: any(s.action is Action.REQUEUE and not s.counted for s in fakes.broker.settlements))
    assert "its slot has passed to another" in caplog.text
    assert claiming.claims.leases["limit:shop.job:a:0"].owner == "other"
    assert run.worker.slots.held == {}
    claiming.claims.leases.clear()
    eventually(lambda: fakes.pool.busy, 10)


def test_a_call_whose_slot_has_passed_on_takes_another_that_is_free(
    app: Umbel, fakes: Fakes, claiming: Claiming
) -> None:
    job = app.task(name="shop.job", concurrency_limit=2)(lambda: 1)
    with running(app, fakes) as run:
        sent = job.delay()
        fakes.pool.job(sent.id)
        (name,) = held(claiming)
        take_over(claiming, name)
        eventually(lambda: len(held(claiming)) == 2)
        assert list(fakes.pool.busy)
        fakes.pool.run(fakes.pool.job(sent.id))
        eventually(lambda: held(claiming) == [name])
        assert run.worker.slots.held == {}


def test_a_store_that_is_down_holds_up_what_needs_it_and_nothing_else(
    run: Running, job: Task[..., Any], fakes: Fakes, claiming: Claiming, caplog: pytest.LogCaptureFixture
) -> None:
    fakes.broker.pace = 0.01
    free = run.worker.app.task(name="shop.free")(lambda: 1)
    claiming.claims.down = True
    sent = job.delay("a")
    fakes.pool.run(fakes.pool.job(free.delay().id))
    eventually(lambda: "no slot of task shop.job can be had" in caplog.text)
    assert never(lambda: any(j.task == "shop.job" for j in fakes.pool.submitted))
    claiming.claims.down = False
    fakes.pool.run(fakes.pool.job(sent.id))
    eventually(lambda: fakes.shelf.state(sent.id) == "SUCCESS")


def test_a_slot_whose_answer_was_lost_is_taken_again(
    run: Running, job: Task[..., Any], fakes: Fakes, claiming: Claiming
) -> None:
    fakes.broker.pace = 0.01
    claiming.claims.lose_answers = 1
    sent = job.delay("a")
    fakes.pool.run(fakes.pool.job(sent.id))
    eventually(lambda: not held(claiming))


def test_a_store_that_goes_away_while_calls_run_lets_them_run(
    run: Running, job: Task[..., Any], fakes: Fakes, claiming: Claiming, caplog: pytest.LogCaptureFixture
) -> None:
    sent = job.delay("a")
    fakes.pool.job(sent.id)
    claiming.claims.down = True
    eventually(lambda: "could not be renewed" in caplog.text)
    fakes.pool.run(fakes.pool.job(sent.id))
    eventually(lambda: "is free only when its lease ends" in caplog.text)
    claiming.claims.down = False
    eventually(lambda: not held(claiming))
    fakes.pool.run(fakes.pool.job(job.delay("a").id))


def test_a_worker_that_stops_gives_back_what_waits_and_frees_its_slots(
    app: Umbel, job: Task[..., Any], fakes: Fakes, claiming: Claiming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_IN_HAND", LONG)
    with running(app, fakes) as run:
        first, second = job.delay("a"), job.delay("a")
        fakes.pool.job(first.id)
        eventually(lambda: any(place.waiting for place in run.worker.slots._places.values()))
        run.stop()
        eventually(lambda: any(s.delivery.message.id == second.id for s in fakes.broker.settlements))
        fakes.pool.run(fakes.pool.job(first.id))
    assert held(claiming) == []
    assert [message.id for message in fakes.broker.messages()] == [second.id]
    assert fakes.broker.find(second.id).count == 0


def test_slots_are_kept_until_what_runs_has_ended_and_is_settled(
    app: Umbel, job: Task[..., Any], fakes: Fakes, claiming: Claiming
) -> None:
    with running(app, fakes) as run:
        sent = job.delay("a")
        fakes.pool.job(sent.id)
        run.stop()
        eventually(lambda: run.worker.stopping)
        assert never(lambda: not held(claiming), 1.0)  # longer than its lease
        fakes.pool.run(fakes.pool.job(sent.id))
    assert held(claiming) == []
    names = [step.name for step in run.worker.steps]
    assert names.index("slots") < names.index("settlement")
    assert names.index("pool") < names.index("admission") < names.index("intake")


def test_keys_that_nothing_is_known_of_any_more_are_forgotten(
    run: Running, job: Task[..., Any], fakes: Fakes, claiming: Claiming
) -> None:
    for n in range(5):
        fakes.pool.run(fakes.pool.job(job.delay(f"t{n}").id))
    eventually(lambda: not held(claiming))
    assert len(run.worker.slots._places) == 5
    run.worker.slots._tidy()
    assert run.worker.slots._places == {}


# --- keys that are not in the header --------------------------------------------------------------


def test_a_message_without_a_key_is_read_and_sent_again_with_it(app: Umbel, job: Task[..., Any], fakes: Fakes) -> None:
    headers = make_headers("shop.job", "t", retries=2, parent_id="p")
    body = json.dumps([["acme"], {}, {"callbacks": None}]).encode()
    fakes.broker.add(Message(queue="default", headers=headers, body=body, priority=3))
    with running(app, fakes):
        reading = fakes.pool.job("t")
        assert reading.payload[0] == "key"
        assert held_names(app) == []
        fakes.pool.run(reading)
        running_job = eventually(lambda: next((j for j in fakes.pool.busy.values() if j.payload[0] == "run"), None))
        again = Message.from_plain(running_job.payload[1])
        fakes.pool.run(running_job)
        eventually(lambda: fakes.shelf.state("t") == "SUCCESS")
    assert (again.headers["umbel-key"], again.headers["retries"], again.headers["parent_id"]) == ("acme", 2, "p")
    assert (again.body, again.priority, again.queue) == (body, 3, "default")
    assert fakes.broker.empty


def held_names(app: Umbel) -> list[str]:
    gateway: Any = app.gateway
    return [lease.name for lease in gateway.runtime.call(gateway.store.claims("limit:"))]


def test_a_message_whose_body_cannot_be_read_for_its_key_dies_of_that(
    app: Umbel, job: Task[..., Any], fakes: Fakes
) -> None:
    fakes.broker.add(Message(queue="default", headers=make_headers("shop.job", "t"), body=b"{"))
    with running(app, fakes):
        fakes.pool.run(fakes.pool.job("t"))
        eventually(lambda: fakes.shelf.state("t") == "FAILURE")
    (dead,) = fakes.broker.messages("default.dead")
    assert "unreadable" in dead.headers["umbel-dead-cause"]


def test_arguments_that_give_no_key_run_under_an_empty_one_and_fail_by_themselves(
    app: Umbel, job: Task[..., Any], fakes: Fakes, caplog: pytest.LogCaptureFixture
) -> None:
    fakes.broker.add(Message(queue="default", headers=make_headers("shop.job", "t"), body=b"[[], {}, {}]"))
    with running(app, fakes):
        fakes.pool.run(fakes.pool.job("t"))
        fakes.pool.run(eventually(lambda: next((j for j in fakes.pool.busy.values() if j.payload[0] == "run"), None)))
        eventually(lambda: fakes.shelf.state("t") == "FAILURE")
    assert "runs under an empty key" in caplog.text


# --- what cannot be kept --------------------------------------------------------------------------


def test_a_store_without_claims_is_refused_with_a_sentence(make_app: MakeApp) -> None:
    app = make_app()
    app.task(name="shop.job", concurrency_limit=3)(lambda: 1)
    with pytest.raises(
        NotSupported, match=r"task 'shop\.job' has concurrency_limit = 3, .* result store 'fake' has none"
    ):
        app.worker()


def test_a_limit_of_the_fleet_is_refused_at_run_time_too(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app()
    app.task(name="shop.job")(lambda: 1)

    async def change(worker: Any) -> None:
        with pytest.raises(NotSupported, match="concurrency_limit = 2"):
            worker.operations.concurrency_limit("shop.job", 2)
        with pytest.raises(NotSupported, match="rate_limit_scope"):
            worker.operations.rate_limit("shop.job", "1/s", "fleet")
        with pytest.raises(ValueError, match="at least 1"):
            worker.operations.concurrency_limit("shop.job", 0)
        assert worker.operations.limits() == {}
        worker.operations.rate_limit("shop.job", "1/s")
        assert worker.operations.limits()["shop.job"]["rate_limit"] == "1/s"

    with running(app, fakes) as run:
        app.runtime.call(change(run.worker))
