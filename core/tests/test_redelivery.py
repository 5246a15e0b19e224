"""A message that comes again to the worker that still has it: it goes on as it is, and ends once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

import attrs
import pytest

from umbel import Umbel
from umbel.model import Action, Delivery, Ending, Message, Settlement, TaskOptions, evolve
from umbel.worker.held import Held

from .conftest import MakeApp
from .fakes import Fakes, FakeTransport, Running, eventually, never, running


@pytest.fixture
def app(make_app: MakeApp, fakes: Fakes) -> Umbel:
    """On a broker like RabbitMQ: what a session holds is handed out again when it ends."""
    fakes.broker.capabilities = attrs.evolve(fakes.broker.capabilities, renewable_lease=False, start_marks=False)
    fakes.broker.bound = True
    fakes.reserve = 2
    app = make_app({"worker.pool": "manual", "worker.concurrency": 2})
    app.task(name="shop.job")(lambda: 1)
    app.task(name="shop.early", ack="early")(lambda: 1)
    return app


@pytest.fixture
def run(app: Umbel, fakes: Fakes) -> Iterator[Running]:
    with running(app, fakes) as run:
        yield run


def runs(fakes: Fakes) -> list[str]:
    return [Message.from_plain(job.payload[1]).id for job in fakes.pool.submitted if job.payload[0] == "run"]


def lose_session(fakes: Fakes, name: str = "a") -> None:
    """Lose the broker's session, and wait until the message has come again."""
    count = fakes.broker.find(name).count
    fakes.broker.sever()
    eventually(lambda: fakes.broker.find(name).count > count)


def test_a_running_task_goes_on_and_is_settled_once_for_its_new_delivery(
    run: Running, app: Umbel, fakes: Fakes
) -> None:
    app.tasks["shop.job"].apply_async(task_id="a")
    job = fakes.pool.job("a")
    for _ in range(3):
        lose_session(fakes)
    assert never(lambda: len(fakes.pool.submitted) > 1)
    assert run.worker.intake.credit.out == len(run.worker.settlement.held) == 1
    fakes.pool.run(job)
    eventually(lambda: fakes.broker.empty)
    (settlement,) = fakes.broker.settlements
    assert (settlement.action, settlement.delivery.count) == (Action.ACK, 4)
    assert [state for name, state in fakes.shelf.history if name == "a"] == ["SUCCESS"]
    assert run.worker.intake.credit.out == run.worker.settlement.stale == 0


def test_what_waits_for_a_slot_goes_on_waiting(run: Running, app: Umbel, fakes: Fakes) -> None:
    for name in ("a", "b", "c"):
        app.tasks["shop.job"].apply_async(task_id=name)
        fakes.pool.job(name)
    lose_session(fakes, "c")
    for name in ("a", "b", "c"):
        fakes.pool.run(fakes.pool.job(name))
    eventually(lambda: fakes.broker.empty)
    assert sorted(runs(fakes)) == ["a", "b", "c"]
    assert {s.action for s in fakes.broker.settlements} == {Action.ACK}


def test_what_is_given_back_is_given_back_by_its_new_delivery(run: Running, app: Umbel, fakes: Fakes) -> None:
    app.tasks["shop.job"].apply_async(task_id="a")
    job = fakes.pool.job("a")
    lose_session(fakes)
    fakes.pool.end(job, Ending.RETURNED)
    fakes.pool.run(eventually(lambda: next((j for j in fakes.pool.busy.values() if j.id != job.id), None)))
    eventually(lambda: fakes.broker.empty)
    assert [s.action for s in fakes.broker.settlements] == [Action.REQUEUE, Action.ACK]


@pytest.mark.parametrize("answered", [False, True])
def test_what_comes_again_while_its_end_is_told_is_told_again(
    run: Running, app: Umbel, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    tell, calls = FakeTransport.settle, []

    async def settle(self: FakeTransport, settlements: Sequence[Settlement]) -> Sequence[bool]:
        calls.append(settlements)
        if len(calls) == 1:
            fakes.broker.sever()
            while next(iter(run.worker.settlement.held.values())).delivery is settlements[0].delivery:  # noqa: ASYNC110  # the intake changes it
                await asyncio.sleep(0.002)
            if answered:
                return [False]
        return await tell(self, settlements)

    monkeypatch.setattr(FakeTransport, "settle", settle)
    app.tasks["shop.job"].apply_async(task_id="a")
    fakes.pool.run(fakes.pool.job("a"))
    eventually(lambda: fakes.broker.empty)
    assert runs(fakes) == ["a"]
    assert [s.action for s in fakes.broker.settlements] == [Action.ACK]
    assert (run.worker.settlement.stale, run.worker.settlement.held) == (0, {})


def test_two_messages_of_one_id_are_both_settled(run: Running, app: Umbel, fakes: Fakes) -> None:
    for _ in range(2):
        app.tasks["shop.job"].apply_async(task_id="a")
    eventually(lambda: len(fakes.pool.busy) == 2)
    fakes.broker.sever()
    eventually(lambda: all(entry.count == 2 for entry in fakes.broker.entries))
    for job in list(fakes.pool.busy.values()):
        fakes.pool.run(job)
    eventually(lambda: fakes.broker.empty)
    assert runs(fakes) == ["a", "a"]


def test_what_was_acknowledged_early_is_not_awaited(run: Running, app: Umbel, fakes: Fakes) -> None:
    app.tasks["shop.early"].apply_async(task_id="a")
    fakes.pool.job("a")
    fakes.broker.sever()
    app.tasks["shop.job"].apply_async(task_id="b")
    fakes.pool.run(fakes.pool.job("b"))
    fakes.pool.run(fakes.pool.job("a"))
    eventually(lambda: not run.worker.settlement.held)
    assert run.worker.intake.credit.out == 0


# --- which delivery is awaited --------------------------------------------------------------------

MESSAGE = Message(queue="q", headers={"id": "a", "task": "t", "retries": 1})
DELIVERY = Delivery(message=MESSAGE, queue="q", token=1, leased_until=100.0)


def held(**changes: object) -> Held:
    made = Held(delivery=DELIVERY, options=TaskOptions(), job_id=1, max_deliveries=3, leased_until=100.0)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def other(**headers: object) -> Delivery:
    message = evolve(MESSAGE, headers={**MESSAGE.headers, **headers})
    return evolve(DELIVERY, message=message, token=2, count=2)


@pytest.mark.parametrize(
    ("one", "delivery", "now", "awaited"),
    [
        (held, other(), 50.0, False),
        (held, other(), 100.0, True),
        (lambda: held(lost=True), other(), 50.0, True),
        (lambda: held(leased_until=None), other(), 500.0, False),
        (lambda: held(leased_until=None, adrift=True), other(), 50.0, True),
        (lambda: held(settled=True), other(), 100.0, False),
        (held, other(retries=2), 100.0, False),
        (held, other(id="b"), 100.0, False),
        (held, evolve(other(), queue="p"), 100.0, False),
    ],
)
def test_it_is_awaited_if_it_was_lost_and_is_the_same(
    one: Callable[[], Held], delivery: Delivery, now: float, awaited: bool
) -> None:
    assert one().awaits(delivery, now) is awaited


def test_a_message_without_an_id_is_nobodys() -> None:
    nameless = evolve(DELIVERY, message=Message(queue="q"))
    assert not held(delivery=nameless).awaits(evolve(nameless, token=2, count=2), 100.0)


def test_it_goes_on_under_the_new_lease() -> None:
    one = held(lost=True, adrift=True)
    again = evolve(other(), leased_until=200.0)
    one.adopt(again)
    assert (one.delivery, one.leased_until, one.lost, one.adrift) == (again, 200.0, False, False)


# --- leases ---------------------------------------------------------------------------------------


def test_a_task_that_outlived_its_lease_goes_on_when_it_comes_again(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"worker.pool": "manual", "broker.lease": 0.3})
    app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        app.tasks["shop.job"].apply_async(task_id="a")
        job = fakes.pool.job("a")
        fakes.broker.steal("a", hide=0.3)
        eventually(lambda: fakes.broker.find("a").count == 3)
        assert never(lambda: len(fakes.pool.submitted) > 1, 0.3)
        fakes.pool.run(job)
        eventually(lambda: fakes.broker.empty)
        assert run.worker.settlement.stale == 0
