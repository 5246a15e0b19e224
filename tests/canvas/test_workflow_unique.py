"""Unique tasks as parts of workflows: sent in any case, they claim their key when a worker takes them on."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from umbel import Umbel, chain, group
from umbel.canvas.sending import shown_of
from umbel.claiming import KEY, Key
from umbel.errors import DuplicateTask, NotSupported, TaskRevoked
from umbel.testing.harness import Harness, in_memory


class Lab:
    def __init__(self) -> None:
        self.app = app = Umbel("lab", settings={"worker.concurrency": 2})
        self.calls: Counter[Any] = Counter()
        self.running = self.most = 0
        self.go_on = threading.Event()

        def work(name: str) -> str:
            self.calls[name] += 1
            self.running += 1
            self.most = max(self.most, self.running)
            self.go_on.wait(10)
            self.running -= 1
            return name

        self.work = app.task(name="work", unique="until_done")(work)
        self.waits = app.task(name="waits", debounce=5.0)(lambda name: name)
        self.hourly = app.task(name="hourly", unique=3600.0)(lambda name: name)

        @app.task(name="first", unique="until_start", on_conflict="replace")
        def first(name: str) -> str:
            self.calls["first"] += 1
            return name

        self.first = first

        @app.task
        def note(value: Any = None) -> Any:
            return value

        @app.task(bind=True, unique="until_done", max_retries=3)
        def flaky(self_: Any, name: str) -> str:
            if self_.request.retries < 2:
                raise self_.retry(countdown=10)
            return name

        self.note, self.flaky = note, flaky


@pytest.fixture
def lab() -> Lab:
    return Lab()


@pytest.fixture
def harness(lab: Lab) -> Iterator[Harness]:
    with in_memory(lab.app) as harness, harness.worker():
        try:
            yield harness
        finally:
            lab.go_on.set()


def claims(lab: Lab) -> list[Any]:
    found: list[Any] = lab.app.gateway.ask("claims", "umbel-unique:")
    return found


@pytest.mark.parametrize(
    ("conflict", "state"), [("drop", "REVOKED"), ("return", "REVOKED"), ("replace", "REVOKED"), ("raise", "FAILURE")]
)
def test_of_two_members_of_a_key_one_runs_and_the_other_ends(
    lab: Lab, harness: Harness, conflict: str, state: str
) -> None:
    calls = [lab.work.s("a").set(on_conflict=conflict) for _ in range(2)]
    sent = (group([*calls, lab.work.s("b")], join="settled") | lab.note.s()).apply_async()
    lab.go_on.wait(0.5)
    lab.go_on.set()
    harness.run_until_idle(20)
    ended = sent.get(timeout=30)
    assert sorted(member["state"] for member in ended) == sorted(["SUCCESS", "SUCCESS", state])
    assert lab.calls == {"a": 1, "b": 1}
    assert claims(lab) == []
    loser = next(handle for handle in sent.parent if handle.state == state)
    with pytest.raises(DuplicateTask if conflict == "raise" else TaskRevoked, match="the same unique key"):
        loser.get(timeout=30)


def test_a_key_that_another_call_holds_ends_the_member_and_what_rides_behind_it(lab: Lab, harness: Harness) -> None:
    alone = lab.work.delay("a")
    sent = (group([lab.work.s("a") | lab.note.s()]) | lab.note.s()).apply_async()
    line = chain(lab.work.s("a"), lab.note.s()).apply_async()
    for handle in (sent.parent[0].parent, sent.parent[0], line.parent, line):
        with pytest.raises(TaskRevoked):
            handle.get(timeout=30)
    lab.go_on.set()
    harness.run_until_idle(20)
    record = shown_of(lab.app, sent.workflow)
    assert record is not None
    assert record.state == "FAILURE"
    assert (alone.get(timeout=30), lab.calls["a"]) == ("a", 1)
    assert lab.work.delay("a").sent, "the key is free"


def test_a_key_is_held_over_retries_and_freed_at_the_end(lab: Lab, harness: Harness) -> None:
    sent = (group([lab.flaky.s("a")]) | lab.note.s()).apply_async()
    harness.run_until_idle(20)
    assert not lab.flaky.delay("a").sent
    harness.advance(30)
    assert sent.get(timeout=30) == ["a"]
    assert claims(lab) == []
    assert lab.flaky.delay("a").sent


def test_a_window_is_held_from_the_start_on(lab: Lab, harness: Harness) -> None:
    sent = (lab.note.s("x") | lab.hourly.s()).apply_async()
    harness.run_until_idle(20)
    assert sent.get(timeout=30) == "x"
    assert not lab.hourly.delay("x").sent
    harness.advance(3601)
    assert lab.hourly.delay("x").sent


def test_a_part_of_a_workflow_takes_the_place_of_a_call_that_waits(lab: Lab, harness: Harness) -> None:
    waiting = lab.first.apply_async(["a"], countdown=60)
    sent = chain(lab.note.s("a"), lab.first.s()).apply_async()
    harness.run_until_idle(20)
    assert sent.get(timeout=30) == "a"
    harness.advance(61)
    with pytest.raises(TaskRevoked, match="replaced by"):
        waiting.get(timeout=30)
    assert lab.calls["first"] == 1


def test_a_call_that_was_replaced_does_not_run_though_the_key_is_free_when_it_comes(lab: Lab, harness: Harness) -> None:
    old = lab.first.apply_async(["a"], countdown=60)
    new = lab.first.apply_async(["a"], countdown=1)
    harness.advance(61)
    assert (old.state, new.state, lab.calls["first"]) == ("REVOKED", "SUCCESS", 1)
    assert claims(lab) == []
    assert lab.first.delay("a").get(timeout=30) == "a"


def test_unique_none_says_that_a_call_is_not(lab: Lab, harness: Harness) -> None:
    sent = group([lab.work.s("a").set(unique=None) for _ in range(2)]).apply_async()
    lab.go_on.set()
    assert sent.get(timeout=30) == ["a", "a"]
    assert all(KEY not in message.headers for message in harness.published)


def test_what_waits_for_other_calls_is_refused_at_the_call(lab: Lab, harness: Harness) -> None:
    waits, note = lab.waits, lab.note
    for canvas in (
        group([waits.s("a"), note.s(1)]),
        note.s(1) | waits.s(),
        group([note.s(1)]) | waits.s(),
        group([note.s(1) | waits.s()]) | note.s(),
        group([note.s(1)]) | note.s() | lab.hourly.s().set(throttle=5, throttle_edge="trailing"),
    ):
        with pytest.raises(NotSupported, match=r"set\(debounce=None\)"):
            canvas.apply_async()
    harness.run_until_idle(20)
    assert harness.published == []
    assert (note.s("a") | waits.s().set(debounce=None)).apply_async().get(timeout=30) == "a"


def test_headers_that_make_no_sense_are_none() -> None:
    from umbel.model import Message

    for header in (
        None,
        "x",
        [],
        ["umbel-unique:t:k"],
        ["lock:t:k", "until_done"],
        ["umbel-unique:t:k", None, "drop"],
        ["umbel-unique:t:k", 5.0],
    ):
        assert Key.of(Message(queue="q", headers={KEY: header})) is None
    assert Key.of(Message(queue="q", headers={KEY: ["umbel-unique:t:k", 5, "drop"]})) == Key(
        "umbel-unique:t:k", 5, "drop"
    )
