"""Revoking what only a body tells of: the task of a message of protocol 1, and the chord that a peer's member belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from umbel import Umbel
from umbel.errors import TaskRevoked
from umbel.model import Action, Ending, Message, evolve
from umbel.protocol import make_headers
from umbel.revocation import Revocation, named
from umbel.worker import revocations as module

from .conftest import MakeApp
from .fakes import Fakes, Running, eventually, running

OLD = {"task": "shop.job", "id": "t", "args": [], "kwargs": {}, "taskset": "g"}
"""A body of protocol 1."""


def old(body: bytes | None = None, **fields: Any) -> Message:
    return Message(queue="default", headers={}, body=json.dumps(OLD).encode() if body is None else body, **fields)


def revoke(app: Umbel, run: Running, *ids: str, **choice: Any) -> None:
    """A worker that runs hears of it."""
    app.control.revoke(*ids, **choice)
    eventually(lambda: run.worker.operations.revocations())


@pytest.fixture
def called(app: Umbel) -> list[str]:
    """What has run."""
    called: list[str] = []
    app.task(name="shop.job")(lambda: called.append("shop.job"))
    app.task(name="shop.other")(lambda: called.append("shop.other"))
    return called


# --- protocol 1 -----------------------------------------------------------------------------------


def test_the_body_of_an_old_message_names_it() -> None:
    found = named(old())
    assert (found.id, found.task, found.headers["group"]) == ("t", "shop.job", "g")
    assert Revocation(until=1e12, headers={"group": "g"}).covers(found)
    new = Message(queue="default", headers=make_headers("shop.job", "t"), body=b"not read")
    assert named(new) is new


@pytest.mark.parametrize(
    "message",
    [
        old(b"\xff"),
        old(b"[" * 30_000),
        old(b"[]"),
        old(json.dumps({**OLD, "args": ["x" * 70_000]}).encode()),
        old(content_type="application/x-repr"),
        Message(queue="default", headers={"compression": "squeeze"}, body=json.dumps(OLD).encode()),
    ],
    ids=["no text", "deep", "another form", "large", "not JSON", "compressed"],
)
def test_a_body_that_is_not_read_here_gives_no_name(message: Message) -> None:
    assert named(message) == message


@pytest.mark.parametrize("choice", [{"ids": ("t",)}, {"task": "shop.job"}, {"headers": {"group": "g"}}])
def test_an_old_message_is_revoked_by_id_name_and_group(
    app: Umbel, fakes: Fakes, called: list[str], choice: dict[str, Any]
) -> None:
    ids = choice.pop("ids", ())
    with running(app, fakes) as run:
        revoke(app, run, *ids, **choice)
        fakes.broker.add(old())
        fakes.broker.add(old(json.dumps({**OLD, "task": "shop.other", "id": "o", "taskset": None}).encode()))
        with pytest.raises(TaskRevoked, match="revoked"):
            app.result("t").get(5)
        assert app.result("o").get(5) is None
        eventually(lambda: fakes.broker.empty)
    assert called == ["shop.other"]
    assert {s.action for s in fakes.broker.settlements} == {Action.ACK}


def test_an_old_message_that_only_an_executor_can_read_is_revoked_too(make_app: MakeApp, fakes: Fakes) -> None:
    """It is sent again in protocol 2, whose headers name it; where nothing is revoked, it simply runs."""
    app = make_app({"codec.accept": ["json", "repr"]})
    called: list[str] = []
    app.task(name="shop.job")(lambda: called.append("shop.job"))
    body = repr(OLD).encode()
    with running(app, fakes) as run:
        fakes.broker.add(old(body, content_type="application/x-repr"))
        assert app.result("t").get(5) is None
        assert len(fakes.broker.settlements) == 1, "not sent again"
        revoke(app, run, task="shop.job")
        fakes.broker.add(old(body.replace(b"'t'", b"'u'"), content_type="application/x-repr"))
        with pytest.raises(TaskRevoked):
            app.result("u").get(5)
        eventually(lambda: fakes.broker.empty)
    assert called == ["shop.job"]


def test_an_old_message_that_waits_or_runs_is_struck(make_app: MakeApp, fakes: Fakes) -> None:
    fakes.reserve = 1
    app = make_app({"worker.pool": "manual", "worker.concurrency": 1})
    app.task(name="shop.job")(lambda: None)
    for number in "ab":
        fakes.broker.add(old(json.dumps({**OLD, "id": number}).encode()))
    with running(app, fakes) as run:
        eventually(lambda: fakes.pool.busy and fakes.pool.waiting)
        for task_id, why in (("b", "revoked"), ("a", "terminated")):
            revoke(app, run, task_id, terminate=True, grace=0)
            with pytest.raises(TaskRevoked, match=why):
                app.result(task_id).get(5)


def test_no_body_is_looked_into_where_nothing_is_revoked(
    app: Umbel, fakes: Fakes, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "named", lambda message: pytest.fail("a body is read"))
    fakes.broker.add(old())
    with running(app, fakes):
        assert app.result("t").get(5) is None
    assert called == ["shop.job"]


# --- members of a peer's chord --------------------------------------------------------------------


class Account:
    """Notes what it is told of the chords of peers."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, int | None, str, str, str]] = []

    def open(self, group: str, size: int) -> bool:
        return False

    def part(self, group: str, index: int | None, task_id: str, part: bytes) -> Sequence[bytes] | None:
        _, _, state, value = json.loads(part)
        self.parts.append((group, index, task_id, state, value["exc_message"][0]))
        return None

    def sent(self, group: str) -> None:
        raise AssertionError("no member is the last one here")


def signature(task: str, **options: Any) -> Mapping[str, Any]:
    return {"task": task, "args": [], "kwargs": {}, "options": options, "subtask_type": None, "immutable": False}


BODY = signature("shop.sum", task_id="body")
EMBED: Mapping[str, Any] = {"callbacks": None, "errbacks": [signature("shop.alarm")], "chain": None, "chord": BODY}


def member(task_id: str, embed: Mapping[str, Any] = EMBED, **headers: Any) -> Message:
    made = make_headers("shop.job", task_id, group="g", group_index=1)
    return Message(queue="default", headers={**made, **headers}, body=json.dumps([[], {}, embed]).encode())


@pytest.fixture
def manual(make_app: MakeApp, fakes: Fakes) -> Umbel:
    """One slot, whose jobs the test ends; the account of chords is kept."""
    fakes.reserve = 1
    app = make_app({"worker.pool": "manual", "worker.concurrency": 1, "worker.grace": 0.1})
    app.task(name="shop.job")(lambda: None)
    app.chords = Account()
    return app


def parts(app: Umbel) -> Sequence[tuple[str, int | None, str, str, str]]:
    assert isinstance(app.chords, Account)
    return app.chords.parts


@pytest.mark.parametrize(("when", "why"), [("comes", "revoked"), ("waits", "revoked"), ("runs", "terminated")])
def test_a_revoked_member_counts(manual: Umbel, fakes: Fakes, when: str, why: str) -> None:
    with running(manual, fakes) as run:
        if when == "waits":
            fakes.broker.add(member("before", {}))
            fakes.pool.job("before")
        if when != "comes":
            fakes.broker.add(member("m"))
            fakes.pool.job("m")
        revoke(manual, run, "m", terminate=True, grace=0)
        if when == "comes":
            fakes.broker.add(member("m"))
        (job,) = eventually(lambda: [job for job in list(fakes.pool.submitted) if job.payload[0] == "revoked"])
        if when == "waits":
            fakes.pool.run(fakes.pool.job("before"))
        fakes.pool.run(job)
        with pytest.raises(TaskRevoked, match=why):
            manual.result("m").get(5)
        eventually(lambda: fakes.broker.empty)
    assert parts(manual) == [("g", 1, "m", "REVOKED", why)]
    assert not fakes.broker.messages(), "no errback is called of what was called off"


def test_of_a_chain_in_a_chord_the_last_counts(manual: Umbel, fakes: Fakes) -> None:
    last = signature("shop.job", task_id="last", group_id="g", group_index=0, chord=BODY)
    embed = {"callbacks": None, "errbacks": None, "chain": [last], "chord": None}
    with running(manual, fakes) as run:
        revoke(manual, run, task="shop.job")
        fakes.broker.add(member("first", embed, group=None, group_index=None))
        fakes.pool.run(fakes.pool.job("first"))
        with pytest.raises(TaskRevoked):
            manual.result("first").get(5)
    assert parts(manual) == [("g", 0, "last", "REVOKED", "revoked")]


@pytest.mark.parametrize(
    "message",
    [evolve(member("m"), body=b"\xff"), member("m", task="shop.none")],
    ids=["no body", "unknown task"],
)
def test_what_cannot_be_read_is_revoked_all_the_same(manual: Umbel, fakes: Fakes, message: Message) -> None:
    with running(manual, fakes) as run:
        revoke(manual, run, "m")
        fakes.broker.add(message)
        fakes.pool.run(fakes.pool.job("m"))
        with pytest.raises(TaskRevoked):
            manual.result("m").get(5)
        eventually(lambda: fakes.broker.empty)


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "runs"])
def test_a_stopping_worker_leaves_a_revoked_member_to_the_next(manual: Umbel, fakes: Fakes, waits: bool) -> None:
    with running(manual, fakes) as run:
        revoke(manual, run, "m")
        if waits:
            fakes.broker.add(member("other", {}))
            fakes.pool.job("other")
        fakes.broker.add(member("m"))
        fakes.pool.job("m")
        run.stop()
        run.join()
    assert "m" not in fakes.shelf.records
    assert "m" in [message.id for message in fakes.broker.messages()]
    assert parts(manual) == []


def test_a_child_that_dies_while_it_tells_of_a_revoked_member_leaves_its_record(manual: Umbel, fakes: Fakes) -> None:
    with running(manual, fakes) as run:
        revoke(manual, run, "m")
        fakes.broker.add(member("m"))
        fakes.pool.end(fakes.pool.job("m"), Ending.LOST, "signal 9 (SIGKILL)")
        with pytest.raises(TaskRevoked, match="revoked"):
            manual.result("m").get(5)
        eventually(lambda: fakes.broker.empty)
