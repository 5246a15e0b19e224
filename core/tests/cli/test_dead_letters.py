"""``umbel dead-letters``: nothing is lost, nothing is touched that was not meant."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest

from umbel.cli.letters import Letter, Selection, Taken, take


@pytest.fixture
def dead(doubles: ModuleType) -> ModuleType:
    """Five dead letters of two queues."""
    doubles.bury("a")
    doubles.bury("b", task="mail.send", cause="timed out: 30 s")
    doubles.bury("c", task="mail.send")
    doubles.bury("d")
    doubles.bury("m", task="mail.send", queue="mail", cause="rejected:\x1b[31m no")
    return doubles


def ids(result: Any) -> list[str]:
    return [line.split()[0] for line in result.stdout.splitlines()[1:]]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], "abcdm"),
        (["--queue", "mail"], "m"),
        (["--queue", "mail.dead"], "m"),
        (["--task", "mail.*"], "bcm"),
        (["--task", "mail"], ""),
        (["--cause", "LOST"], "acd"),
        (["--task", "mail.*", "--cause", "lost"], "c"),
        (["--limit", "2"], "ab"),
    ],
)
def test_list(umbel: Any, dead: ModuleType, filters: list[str], expected: str) -> None:
    result = umbel("dead-letters", "list", *filters)
    assert result.exit_code == 0
    assert ids(result) == list(expected)
    assert [each["id"] for each in json.loads(umbel("dead-letters", "list", *filters, "--json").stdout)] == list(
        expected
    )


def test_list_shows_what_matters(umbel: Any, dead: ModuleType) -> None:
    heading, row = umbel("dead-letters", "list", "--queue", "mail").stdout.splitlines()
    assert heading.split() == ["ID", "TASK", "QUEUE", "DIED", "DELIVERIES", "CAUSE"]
    assert row.split() == ["m", "mail.send", "mail", "2023-11-14", "22:13:20", "3", "rejected:\\x1b[31m", "no"]
    assert "there are more" in umbel("dead-letters", "list", "--limit", "4").stderr
    assert "no dead letters" in umbel("dead-letters", "list", "--task", "x").stderr


def test_more_than_a_page_is_listed(umbel: Any, doubles: ModuleType) -> None:
    for number in range(250):
        doubles.bury(str(number))
    assert len(ids(umbel("dead-letters", "list", "--limit", "1000"))) == 250


def test_show(umbel: Any, dead: ModuleType) -> None:
    text = umbel("dead-letters", "show", "b").stdout
    assert "timed out: 30 s" in text
    assert "[[1, 2], {}, {}]" in text
    assert "umbel-dead-count  3" in text
    (letter,) = json.loads(umbel("dead-letters", "show", "b", "--json").stdout)
    assert letter["body"] == [[1, 2], {}, {}]
    assert letter["headers"]["lang"] == "py"
    assert umbel("dead-letters", "show", "nope").exit_code == 1


@pytest.mark.parametrize(
    "message",
    [{"content_type": "application/x-python-serialize"}, {"headers": {"compression": "application/x-gzip"}}],
    ids=["pickle", "gzip"],
)
def test_what_is_not_accepted_is_not_decoded(umbel: Any, doubles: ModuleType, message: dict[str, Any]) -> None:
    doubles.bury("p", body=b"\x80\x04", **message)
    text = umbel("dead-letters", "show", "p").stdout
    assert "is not accepted" in text
    assert "it begins 8004" in text
    (letter,) = json.loads(umbel("dead-letters", "show", "p", "--json").stdout)
    assert (letter["hex"], letter["size"]) == ("8004", 2)
    assert "body" not in letter


def test_replay_by_id(umbel: Any, dead: ModuleType) -> None:
    dead.store("c", "FAILURE", None)
    result = umbel("dead-letters", "replay", "c")
    assert (result.exit_code, result.stdout) == (0, "1 dead letter replayed\n")
    (message,) = dead.FakeTransport.queues["default"]
    assert (message.id, message.queue, message.body) == ("c", "default", b"[[1, 2], {}, {}]")
    assert message.headers == {"id": "c", "task": "mail.send", "lang": "py"}
    assert message.properties == {}, "to its queue, not to the exchange that it came by"
    assert dead.waiting("default.dead") == ["a", "b", "d"]
    assert not dead.FakeTransport.leased
    assert not dead.FakeStore.records


def test_what_does_not_match_keeps_its_place_and_its_count(umbel: Any, dead: ModuleType) -> None:
    umbel("dead-letters", "replay", "--all", "--cause", "timed out")
    assert dead.waiting("default") == ["b"]
    assert dead.waiting("default.dead") == ["a", "c", "d"]
    assert dead.FakeTransport.requeued
    assert not any(settlement.counted for settlement in dead.FakeTransport.requeued)


def test_replay_of_all(umbel: Any, dead: ModuleType) -> None:
    assert umbel("dead-letters", "replay", "--all").stdout == "5 dead letters replayed\n"
    assert (dead.waiting("default"), dead.waiting("mail")) == (["a", "b", "c", "d"], ["m"])
    assert not dead.waiting("default.dead")


def test_no_more_is_taken_than_lay_there_at_the_start(dead: ModuleType) -> None:
    """Others may take some of the chosen meanwhile, so that their number alone would never be reached."""
    dead.FakeTransport.queues["default.dead"].pop()
    taken = Taken()

    async def bury_again(letters: Sequence[Letter]) -> None:
        for letter in letters:
            dead.bury(letter.id)

    transport = dead.FakeTransport("")
    everything = take(transport, "default.dead", Selection(), bury_again, at_most=1000, taken=taken)
    asyncio.run(asyncio.wait_for(everything, 10))
    assert taken.ids == ["a", "b", "c"]
    assert dead.waiting("default.dead") == ["a", "b", "c"]


def test_what_dies_again_meanwhile_is_not_replayed_for_ever(umbel: Any, dead: ModuleType) -> None:
    dead.FakeTransport.on_publish = lambda message: dead.bury(message.id)
    assert umbel("dead-letters", "replay", "--all", "--queue", "default").stdout == "4 dead letters replayed\n"
    assert dead.waiting("default.dead") == ["a", "b", "c", "d"]


def test_a_broker_that_fails_half_way_loses_nothing(umbel: Any, dead: ModuleType) -> None:
    dead.FakeTransport.publishes_until_refusal = 1
    result = umbel("dead-letters", "replay", "--all", "--queue", "default")
    assert result.exit_code == 1
    assert result.stdout == "2 dead letters replayed\n"
    assert result.stderr == "Error: the broker has gone\n"
    assert dead.waiting("default") == ["a", "b"]
    assert dead.waiting("default.dead") == ["c", "d"]
    assert not dead.FakeTransport.leased


def test_letters_that_somebody_else_took_do_not_hold_it_up(
    umbel: Any, dead: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(self: Any, queues: Any, *, credit: Any, lease: float) -> Any:
        yield []

    monkeypatch.setattr(dead.FakeTransport, "consume", nothing)
    assert umbel("dead-letters", "replay", "--all").stdout == "0 dead letters replayed\n"


def test_late_settlements_are_told(umbel: Any, dead: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    async def late(self: Any, settlements: Any) -> list[bool]:
        return [False] * len(settlements)

    monkeypatch.setattr(dead.FakeTransport, "settle", late)
    result = umbel("dead-letters", "replay", "m")
    assert "1 of them may still be there" in result.stderr


def test_missing_ids_are_named(umbel: Any, dead: ModuleType) -> None:
    result = umbel("dead-letters", "replay", "a", "nope")
    assert result.exit_code == 1
    assert result.stdout == "1 dead letter replayed\n"
    assert "no dead letter has the id 'nope'" in result.stderr


def test_expired_tasks_are_told(umbel: Any, doubles: ModuleType) -> None:
    doubles.bury("old", headers={"expires": "2020-01-01T00:00:00+00:00"})
    assert "1 of them had expired" in umbel("dead-letters", "replay", "--all").stderr


@pytest.mark.parametrize("command", ["replay", "purge"])
@pytest.mark.parametrize("arguments", [[], ["a", "--all"], ["--task", "x"]])
def test_it_must_be_said_which(umbel: Any, dead: ModuleType, command: str, arguments: list[str]) -> None:
    result = umbel("dead-letters", command, *arguments)
    assert result.exit_code == 2
    assert "say which" in result.stderr


def test_purge(umbel: Any, dead: ModuleType) -> None:
    result = umbel("dead-letters", "purge", "--all", "--task", "mail.send")
    assert result.exit_code == 2
    assert "Delete 3 dead letters?" in result.stderr
    assert umbel("dead-letters", "purge", "--all", "--task", "mail.send", "--yes").stdout == "3 dead letters deleted\n"
    assert dead.waiting("default.dead") == ["a", "d"]
    assert umbel("dead-letters", "purge", "a", "--yes").exit_code == 0
    assert dead.waiting("default.dead") == ["d"]
    assert not dead.waiting("default")
