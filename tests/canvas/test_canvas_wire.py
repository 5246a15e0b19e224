"""Canvases as Celery has sent them: every captured message of one runs, and what is to follow follows."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from canvas_model import Lab

from umbel.model import FINAL_STATES, Message
from umbel.testing.harness import Harness

CORPUS = Path(__file__).parents[1] / "wire/corpus"


def captured() -> Iterator[Mapping[str, Any]]:
    """Task messages that are part of a chord, carry one, or are of the tasks that canvases are made of."""
    for file in sorted(CORPUS.glob("0[123459]-*.json")):
        for entry in json.loads(file.read_text()):
            if entry["kind"] == "task" and is_canvas(entry):
                yield {**entry, "name": f"{file.name[:2]}-{entry['name']}"}


def is_canvas(entry: Mapping[str, Any]) -> bool:
    text = json.dumps(embed_of(entry))
    return headers_of(entry).get("task", "").startswith("celery.") or '"chord": {' in text or '"celery.chord"' in text


def headers_of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    headers: Mapping[str, Any] = entry.get("headers") or {}
    return headers if "task" in headers or not isinstance(entry["decoded"], Mapping) else entry["decoded"]


def embed_of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    body = entry["decoded"]
    embed = (body if isinstance(body, Mapping) else body[2] if isinstance(body, list) else {}) or {}
    return {part: embed.get(part) for part in ("callbacks", "errbacks", "chain", "chord")}


class Account:
    """Keeps the account of peers' chords as if every member were the last."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, int | None, str]] = []
        self.over: list[str] = []

    def open(self, group: str, size: int) -> bool:
        return False

    def part(self, group: str, index: int | None, task_id: str, part: bytes) -> Sequence[bytes] | None:
        self.parts.append((group, index, task_id))
        return [part]

    def sent(self, group: str) -> None:
        self.over.append(group)


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.app.task(name="wire.add")(lambda x, y: x + y)
    lab.app.task(name="wire.mul")(lambda x, y: x * y)
    lab.app.task(name="wire.xsum")(lambda numbers: sum(numbers))
    lab.app.task(name="wire.echo")(lambda *args, **kwargs: [list(args), kwargs])
    return lab


def deliver(lab: Lab, harness: Harness, *entries: Mapping[str, Any]) -> None:
    for entry in entries:
        message = Message(
            queue="default",
            headers=entry["headers"] or {},
            body=base64.b64decode(entry["body_base64"]),
            content_type=entry["content_type"],
            content_encoding="utf-8",
        )
        lab.app.gateway.publish([message], 5)
    harness.run_until_idle(20)


def bodies(chord: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tasks that a chord's body begins with."""
    if chord["subtask_type"] == "chain":
        return bodies(chord["kwargs"]["tasks"][0])
    if chord["subtask_type"] == "group":
        return [body for member in chord["kwargs"]["tasks"] for body in bodies(member)]
    return [chord]


@pytest.mark.parametrize("entry", list(captured()), ids=lambda entry: entry["name"])
def test_a_captured_canvas_goes_on(entry: Mapping[str, Any], lab: Lab) -> None:
    account = lab.app.chords = Account()
    headers, embed = headers_of(entry), embed_of(entry)
    with lab.running() as harness:
        deliver(lab, harness, entry)
        if headers["task"] == "celery.chord_unlock":
            harness.advance(30)
            return
        record = lab.app.result(headers["id"])
        assert record.state == "SUCCESS", record.result
        if headers["task"] == "celery.starmap":
            kwargs = entry["decoded"][1]
            assert record.result == [sum(items) for items in kwargs["it"]]
        if (chord := embed["chord"]) is not None:
            group = headers.get("group") or headers.get("taskset")
            assert account.parts == [(group, headers.get("group_index"), headers["id"])]
            assert account.over == [group]
            sent = {message.task for message in harness.published[1:]}
            assert sent >= {body["task"] for body in bodies(chord)}
            for body in bodies(chord):
                if task_id := body["options"].get("task_id"):
                    assert lab.app.result(task_id).state in FINAL_STATES
        for step in embed["chain"] or ():
            if step["subtask_type"] is None and (task_id := step["options"].get("task_id")):
                assert lab.app.result(task_id).state in FINAL_STATES


def test_a_chord_that_is_looked_after_by_a_task_is_ended_by_it(lab: Lab) -> None:
    """The form of stores that do not count: ``celery.chord_unlock`` comes first, and looks again until all are there."""
    entries = {entry["name"]: entry for entry in captured()}
    unlock, *members = (entries[f"02-chord-unlock-db{end}"] for end in ("", "#1", "#2"))

    class NoAccount(Account):
        def part(self, group: str, index: int | None, task_id: str, part: bytes) -> None:
            return None

    lab.app.chords = NoAccount()
    body = unlock["decoded"][0][1]
    with lab.running() as harness:
        deliver(lab, harness, unlock)
        harness.advance(10)
        deliver(lab, harness, members[0])
        harness.advance(10)
        assert not lab.app.result(body["options"]["task_id"]).ready()
        deliver(lab, harness, members[1])
        harness.advance(10)
        values = [sum(member["decoded"][0]) for member in members]
        assert lab.app.result(body["options"]["task_id"]).get(timeout=30) == sum(values)


def test_without_an_account_a_member_is_refused_by_name(lab: Lab) -> None:
    entry = next(entry for entry in captured() if embed_of(entry)["chord"])
    with lab.running() as harness:
        deliver(lab, harness, entry)
        assert "hooks" in str(lab.app.result(headers_of(entry)["id"]).result)
