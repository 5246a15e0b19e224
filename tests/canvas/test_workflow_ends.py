"""Every way in which a member, a body, or what starts it can end is an end: no workflow waits for what never comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from umbel import Umbel, chain, group, hookimpl
from umbel.canvas import joining
from umbel.canvas.graph import FIRE, join_key
from umbel.canvas.sending import shown_of
from umbel.errors import Ignore, Reject, TaskRevoked, UmbelError
from umbel.model import Delivery, Message, Outcome, State, Verdict, evolve
from umbel.testing.harness import Harness, in_memory
from umbel.worker import settle
from umbel.worker.held import End, Held


class Spoiling:
    """A plugin: spoils messages on their way to the broker."""

    def __init__(self) -> None:
        self.tasks: set[str] = set()
        self.spoiled: list[Message] = []

    @hookimpl(wrapper=True)
    def umbel_make_transport(self) -> Iterator[None]:
        transport: Any = yield
        for name in ("publish", "publish_blocking"):
            self._wrap(transport, name)
        return transport  # type: ignore[no-any-return]  # what a wrapper of pluggy's gives back

    def _wrap(self, transport: Any, name: str) -> None:
        publish = getattr(transport, name)
        setattr(transport, name, lambda messages, **how: publish([self._spoil(m) for m in messages], **how))

    def _spoil(self, message: Message) -> Message:
        if message.task not in self.tasks:
            return message
        self.spoiled.append(message)
        return evolve(message, content_type="application/x-nonsense")


class Lab:
    def __init__(self) -> None:
        self.spoiling = Spoiling()
        self.app = app = Umbel("lab", plugins=[self.spoiling])
        self.calls: Counter[Any] = Counter()

        @app.task
        def note(*what: Any) -> Any:
            self.calls[what[-1]] += 1
            return what[-1]

        @app.task
        def ignored() -> None:
            raise Ignore

        @app.task
        def rejected() -> None:
            raise Reject("no use")

        self.note, self.ignored, self.rejected = note, ignored, rejected

    def workflow(self, member: Any, *more: Any) -> Any:
        body = self.note.s("body").link_error(self.note.si("told of the body"))
        return (group([self.note.s("member"), member, *more]) | body).on_error(self.note.si("told"))

    def settled(self, harness: Harness) -> None:
        harness.advance(120)
        for _ in range(3):
            self.app.runtime.call(harness._worker.workflows.reconcile(), timeout=10)  # type: ignore[union-attr]  # it runs
            harness.run_until_idle(20)

    def state(self, workflow: str) -> str:
        record = shown_of(self.app, workflow)
        assert record is not None
        return record.state


@pytest.fixture
def lab() -> Lab:
    return Lab()


@pytest.fixture
def harness(lab: Lab) -> Iterator[Harness]:
    with in_memory(lab.app, settings={"worker.max_deliveries": 2}) as harness, harness.worker():
        yield harness


ENDS = ("expired", "revoked", "revoked together", "unknown", "unreadable", "rejected", "ignored", "gives way")


def ending(lab: Lab, how: str) -> Any:
    """A call that ends in this way."""
    call = lab.note.s("never").set(countdown=60)
    match how:
        case "expired":
            return call.set(expires=30)
        case "revoked":
            lab.app.control.revoke("revoked")
            return call.set(task_id="revoked")
        case "revoked together":
            lab.app.control.revoke(headers={"tenant": "acme"})
            return call.stamp(tenant="acme")
        case "unknown":
            return lab.app.signature("nobody.knows.this")
        case "unreadable":
            lab.spoiling.tasks.add("unreadable")
            return lab.app.signature("unreadable")
        case "gives way":
            claimed = lab.app.gateway.ask("claim", ("umbel-unique:" + lab.note.name + ":k", "another", 3600.0, b"runs"))
            assert claimed["owner"] == "another"
            return call.set(unique="until_done", unique_key="k")
    return getattr(lab, how).s()


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("place", ["member", "first of a member", "body"])
def test_each_end_ends_the_workflow(lab: Lab, harness: Harness, how: str, place: str) -> None:
    call = ending(lab, how)
    if place == "body":
        sent = (group([lab.note.s("member")]) | call | lab.note.s("after")).on_error(lab.note.si("told")).apply_async()
    elif place == "member":
        sent = lab.workflow(call).apply_async()
    else:
        sent = lab.workflow(call | lab.note.s("second") | lab.note.s("third")).apply_async()
    lab.settled(harness)
    assert lab.state(sent.workflow) in ("FAILURE", "REVOKED")
    assert sent.state in ("FAILURE", "REVOKED")
    assert lab.calls["told"] == 1
    assert not any(lab.calls[what] for what in ("never", "second", "third", "after", "body"))
    if place == "first of a member":
        for handle in (sent.parent[1], sent.parent[1].parent, sent.parent[1].parent.parent):
            assert handle.state in ("FAILURE", "REVOKED"), "what rides behind it has ended with it"


@pytest.mark.parametrize(
    ("how", "state"),
    [(how, "REVOKED") for how in ENDS[:3]]
    + [("unknown", "FAILURE"), ("unreadable", "FAILURE"), ("rejected", "FAILURE"), ("gives way", "REVOKED")],
)
def test_what_rides_in_a_message_ends_with_it(lab: Lab, harness: Harness, how: str, state: str) -> None:
    """A chain of plain tasks, of which nothing is stored beside the records."""
    sent = chain(
        ending(lab, how), lab.note.s("second"), group([lab.note.s("third"), lab.note.s("fourth")])
    ).apply_async()
    lab.settled(harness)
    assert sent.parent.parent.state == state
    assert [sent.parent.state, sent[0].state, sent[1].state] == [state] * 3
    if state == "REVOKED":
        with pytest.raises(TaskRevoked):
            sent.get(timeout=30)
    assert not lab.calls


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_is_marked_or_goes_on(lab: Lab, harness: Harness, verdict: Verdict) -> None:
    """Whatever comes of a member's delivery: it goes back, goes on as another message, or is marked."""
    worker: Any = harness._worker
    message = lab.app.client.message(
        "t", (), {}, lab.note.options, headers={"umbel-workflow": "w", "umbel-node": "0:0"}, ignore_result=False
    )
    delivery = Delivery(message=message, token="1", queue="default", count=9)
    held = Held(delivery, lab.note.options, 1, 3, None, starts=9)
    end = End(held, Outcome(verdict=verdict, task_id=message.id, task="t"))
    end.settlement = settle.decide(end.outcome, delivery, starts=9, max_deliveries=3)
    mark = worker.workflows._mark(end, [])
    goes_back = verdict in (Verdict.RETURNED, Verdict.CANCELLED, Verdict.REQUEUED)
    goes_on = verdict in (Verdict.RETRY, Verdict.FORWARDED)
    assert (mark is None) == (goes_back or goes_on)


def test_members_end_though_their_record_is_refused(lab: Lab, harness: Harness) -> None:
    outcome = Outcome(verdict=Verdict.FAILURE, results=(), detail="the result store refused the record")
    worker: Any = harness._worker
    message = lab.app.client.message(
        "t", (), {}, lab.note.options, headers={"umbel-workflow": "w", "umbel-node": "0:0"}
    )
    success = worker.records.final(message.id, State.SUCCESS, 1, headers=message.headers, properties=message.properties)
    held = Held(Delivery(message=message, token="1", queue="default"), lab.note.options, 1, 3, None)
    mark = worker.workflows._mark(End(held, evolve(outcome, results=success)), [])
    assert mark.state == "FAILURE", "it is a success no more"


# --- what goes on with a workflow ------------------------------------------------------------------


def broken(lab: Lab, harness: Harness, sent: Any) -> str:
    """How the workflow has failed; it has told of that once."""
    lab.settled(harness)
    assert lab.state(sent.workflow) == "FAILURE"
    assert lab.calls["told"] == lab.calls["told of the body"] == 1
    assert not lab.calls["body"]
    return str(sent.get(timeout=30, propagate=False))


def test_a_lost_firing_message_lets_the_workflow_fail(
    lab: Lab, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = lab.app.client.message

    def spoilt(name: str, args: Sequence[Any], *more: Any, **options: Any) -> Message:
        made = message(name, args, *more, **options)
        return evolve(made, content_type="application/x-nonsense") if name == FIRE and len(args) == 2 else made

    monkeypatch.setattr(lab.app.client, "message", spoilt)
    sent = lab.workflow(lab.note.s("other")).apply_async()
    harness.run_until_idle(20)
    monkeypatch.undo()
    assert "cannot go on: the task that was to go on with it has ended: unreadable" in broken(lab, harness, sent)


def test_a_workflow_whose_every_firing_message_is_lost_is_known_to_have_ended(lab: Lab, harness: Harness) -> None:
    lab.spoiling.tasks.add(FIRE)
    sent = lab.workflow(lab.note.s("other")).apply_async()
    lab.settled(harness)
    assert len(lab.spoiling.spoiled) == 2, "it, and the one that was to say so"
    assert lab.state(sent.workflow) == "FAILURE"


def test_marks_that_cannot_be_read_let_the_workflow_fail(lab: Lab, harness: Harness) -> None:
    later = lab.note.s("other").set(countdown=60)
    sent = lab.workflow(later).apply_async()
    harness.run_until_idle(20)
    names = [name for name in ("0", "1", "2", "3") if joining.members(lab.app.gateway, join_key(sent.workflow, name))]
    (gate,) = names
    call = joining.Marked(join_key(sent.workflow, gate), {"1": b"nonsense"}, None, "x", 3600)
    joining.join(lab.app.gateway, [call])
    assert "cannot be read" in broken(lab, harness, sent)


def test_who_revokes_all_of_a_root_does_not_keep_the_workflow_from_ending(lab: Lab, harness: Harness) -> None:
    sent = lab.workflow(lab.note.s("never").set(countdown=60)).apply_async()
    harness.run_until_idle(20)
    lab.app.control.revoke(headers={"root_id": sent.workflow})
    lab.settled(harness)
    assert lab.state(sent.workflow) == "FAILURE"
    assert not lab.calls["never"]
    with pytest.raises(UmbelError):
        sent.get(timeout=30)


def test_a_fire_task_by_hand_is_refused_and_harms_nothing(lab: Lab, harness: Harness) -> None:
    message = lab.app.client.message(FIRE, (), {}, lab.note.options, headers={"umbel-workflow": "fire/w"})
    lab.app.client.send([message])
    harness.run_until_idle(20)
    assert lab.note.delay("still works").get(timeout=30) == "still works"
