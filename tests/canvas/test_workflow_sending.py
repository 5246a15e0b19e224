"""A workflow whose sending breaks off comes to an end: its sender died, stood still, or was told of a fault."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from umbel import Umbel, chord, group
from umbel.canvas import sending
from umbel.canvas.again import retry
from umbel.canvas.sender import Sender
from umbel.canvas.sending import Storing, shown_of
from umbel.errors import BrokerUnavailable, TaskRevoked, UmbelError, WorkflowBroken
from umbel.testing.harness import Harness, in_memory


class Died(BaseException):
    """The sender's process is gone."""


class Lab:
    def __init__(self, harness: Harness, app: Umbel) -> None:
        self.harness, self.app = harness, app
        self.calls: Counter[Any] = Counter()

        @app.task
        def note(*what: Any) -> Any:
            self.calls[what[-1]] += 1
            return what[-1]

        self.note = note

    def later(self, seconds: float = 100) -> None:
        """Let the leases of the dead end, and be looked after what they have left.

        What runs ends before: a workflow may be given up while its last task is at work, which then runs all the same.
        """
        self.harness.run_until_idle(60)
        self.harness.advance(seconds)
        for _ in range(3):
            self.app.runtime.call(self.harness._worker.workflows.reconcile(), timeout=10)  # type: ignore[union-attr]  # it runs
            self.harness.run_until_idle(20)

    def state(self, workflow: str) -> str:
        record = shown_of(self.app, workflow)
        assert record is not None
        return record.state

    @property
    def workflow(self) -> str:
        """The only one that there is."""
        (lease,) = self.app.gateway.ask("claims", "umbel-workflow/")
        return str(lease["name"]).removeprefix("umbel-workflow/")


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setattr(sending, "_BATCH", 4)
    app = Umbel("lab")
    with in_memory(app) as harness:
        made = Lab(harness, app)
        with harness.worker():
            yield made


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who dies says nothing more."""
    monkeypatch.setattr(Sender, "__exit__", lambda *_: None)
    monkeypatch.setattr(Storing, "never_sent", lambda *_: None)


def breaking(lab: Lab, exc: BaseException, at: int = 6, **options: Any) -> Any:
    """A streamed group that breaks off in its second part."""

    def members() -> Iterator[Any]:
        for number in range(at):
            yield lab.note.s(number)
        raise exc

    body = lab.note.s("body").link_error(lab.note.si("told of the body"))
    return (group(members(), **options).on_error(lab.note.si("told of the group")) | body).on_error(lab.note.si("told"))


@pytest.mark.parametrize("join", ["all", "settled", 10])
@pytest.mark.usefixtures("deadly")
def test_a_workflow_whose_sender_has_died_fails_once(lab: Lab, join: Any) -> None:
    with pytest.raises(Died):
        breaking(lab, Died(), join=join).set(task_id="body").apply_async()
    lab.harness.run_until_idle(20)
    assert lab.state(lab.workflow) == "WORKFLOW"
    lab.later(20)
    assert lab.state(lab.workflow) == "WORKFLOW", "its sender may live"
    lab.later()
    assert lab.state(lab.workflow) == "FAILURE"
    told = {what: number for what, number in lab.calls.items() if isinstance(what, str)}
    assert told == {"told of the group": 1, "told of the body": 1, "told": 1}
    assert sorted(what for what in lab.calls if isinstance(what, int)) == [0, 1, 2, 3], "what was sent runs"
    with pytest.raises(WorkflowBroken, match="was not sent whole: its sender was lost"):
        lab.app.result("body").get(timeout=30)
    with pytest.raises(UmbelError, match="only the program that sent it"):
        retry(lab.app, lab.workflow)


@pytest.mark.usefixtures("deadly")
def test_enough_that_have_succeeded_are_enough_though_the_sender_has_died(lab: Lab) -> None:
    with pytest.raises(Died):
        breaking(lab, Died(), join=3).apply_async()
    lab.later()
    assert lab.state(lab.workflow) == "SUCCESS"
    assert {what: number for what, number in lab.calls.items() if isinstance(what, str)} == {"body": 1}


@pytest.mark.usefixtures("deadly")
def test_the_members_are_cancelled_where_their_group_says_so(lab: Lab) -> None:
    def members() -> Iterator[Any]:
        for number in range(4):
            yield lab.note.s(number).set(countdown=3600, task_id=f"member {number}")
        raise Died

    with pytest.raises(Died):
        (group(members(), on_failure="cancel") | lab.note.s("body")).apply_async()
    lab.later()
    assert lab.state(lab.workflow) == "FAILURE"
    lab.harness.advance(3600)
    assert not lab.calls
    with pytest.raises(TaskRevoked):
        lab.app.result("member 0").get(timeout=30)


def test_what_breaks_off_by_an_exception_fails_soon_and_says_why(lab: Lab) -> None:
    with pytest.raises(ValueError, match="no more"):
        breaking(lab, ValueError("no more")).set(task_id="body").apply_async()
    lab.later(1)
    assert lab.state(lab.workflow) == "FAILURE"
    with pytest.raises(WorkflowBroken, match="ValueError: no more"):
        lab.app.result("body").get(timeout=30)
    assert lab.calls["told"] == 1


def test_of_what_was_never_accepted_the_caller_alone_is_told(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise BrokerUnavailable("it is away")

    monkeypatch.setattr(lab.app.client, "send", refuse)
    with pytest.raises(BrokerUnavailable):
        chord([lab.note.s(1)], lab.note.s(2)).on_error(lab.note.si("told")).apply_async()
    monkeypatch.undo()
    lab.later()
    assert lab.state(lab.workflow) == "FAILURE"
    assert not lab.calls


def test_a_sender_that_stood_still_is_told_that_its_workflow_was_given_up(lab: Lab) -> None:
    def members() -> Iterator[Any]:
        for number in range(12):
            if number == 6:
                lab.later()
            yield lab.note.s(number)

    with pytest.raises(WorkflowBroken, match="nothing was heard of its sender"):
        (group(members()) | lab.note.s("body")).on_error(lab.note.si("told")).apply_async()
    lab.later()
    assert lab.state(lab.workflow) == "FAILURE"
    assert {what: number for what, number in lab.calls.items() if isinstance(what, str)} == {"told": 1}


@pytest.mark.usefixtures("deadly")
def test_a_sender_may_die_between_any_two_words(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway: Any = lab.app.gateway
    left, sender = -1, threading.get_ident()

    def dying(name: str) -> None:
        call = getattr(gateway, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            answer = call(*args, **kwargs)
            if threading.get_ident() == sender:  # the worker's tasks ask the same gateway
                left -= 1
                if left == 0:
                    raise Died
            return answer

        monkeypatch.setattr(gateway, name, called)

    for name in ("ask", "put", "publish"):
        dying(name)
    inner = chord([lab.note.s(1), lab.note.s(2)], lab.note.s("inner"))
    states = Counter[str]()
    for words in range(1, 100):
        lab.calls.clear()
        members = (inner if number == 2 else lab.note.s(number) for number in range(7))
        canvas = (group(members) | lab.note.s("body")).on_error(lab.note.si("told"))
        left = words
        try:
            canvas.apply_async()
        except Died:
            died = True
        else:
            died = False
        left = -1
        lab.later()
        claims = lab.app.gateway.ask("claims", "umbel-workflow/")
        for lease in claims:
            state = lab.state(str(lease["name"]).removeprefix("umbel-workflow/")) if stored(lab, lease) else "NONE"
            states[state] += 1
            assert lab.calls["told"] <= (state == "FAILURE"), (words, state, lab.calls)
            assert (state == "SUCCESS") == (lab.calls["body"] == 1), (words, state, lab.calls)
            assert state != "WORKFLOW", words
            lab.app.gateway.ask("release", (lease["name"], lease["owner"], None))
        if not died:
            break
    assert not died
    assert states["FAILURE"] >= 5
    assert states["SUCCESS"] >= 1


def stored(lab: Lab, lease: Any) -> bool:
    return shown_of(lab.app, str(lease["name"]).removeprefix("umbel-workflow/")) is not None
