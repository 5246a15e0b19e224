"""``umbel queues``, ``umbel purge``, ``umbel status``."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest

from umbel.model import Message


def fill(doubles: ModuleType, queue: str, number: int) -> None:
    doubles.FakeTransport.queues[queue] = [Message(queue=queue, headers={"id": str(n)}) for n in range(number)]


def test_every_queue_is_counted(umbel: Any, doubles: ModuleType) -> None:
    fill(doubles, "mail", 2)
    doubles.bury("x", queue="mail")
    lines = umbel("queues", "-o", "worker.queues=slow").stdout.splitlines()
    assert lines[0].split() == ["QUEUE", "READY", "DELAYED", "LEASED", "OLDEST"]
    assert [line.replace("3m 20s", "AGE").replace("3m 21s", "AGE").split() for line in lines[1:]] == [
        ["default", "0", "0", "0", "-"],
        ["mail", "2", "0", "0", "AGE"],
        ["mail.dead", "1", "0", "0", "AGE", "dead", "letters"],
        ["slow", "0", "0", "0", "-"],
    ]


def test_dead_letters_are_found_where_queues_cannot_be_listed(umbel: Any, doubles: ModuleType) -> None:
    doubles.bury("x", queue="mail")
    options = ("--broker", "doubles:UnlistedTransport", "-o", "queues.mail.max_priority=3")
    lines = umbel("queues", *options).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["default", "mail", "mail.dead"]
    assert "tasks.add" in umbel("dead-letters", "list", *options).stdout


def test_named_queues_as_json(umbel: Any, doubles: ModuleType) -> None:
    fill(doubles, "mail", 2)
    (row,) = json.loads(umbel("queues", "mail", "--json").stdout)
    assert (row["queue"], row["ready"], row["dead_letters"]) == ("mail", 2, False)
    assert row["oldest_age"] == pytest.approx(200, abs=5)


def test_purge_asks_nobody_where_nobody_is(umbel: Any, doubles: ModuleType) -> None:
    fill(doubles, "mail", 2)
    result = umbel("purge", "mail")
    assert result.exit_code == 2
    assert "Delete 2 messages of mail? Nobody can be asked here: give --yes." in result.stderr
    assert doubles.waiting("mail")


def test_purge_says_how_many(umbel: Any, doubles: ModuleType) -> None:
    fill(doubles, "mail", 1)
    fill(doubles, "slow", 2)
    result = umbel("purge", "mail", "slow", "mail", "--yes")
    assert result.stdout == "1 message of mail deleted\n2 messages of slow deleted\n"
    assert not doubles.FakeTransport.queues


@pytest.mark.parametrize(("answer", "left"), [("y\n", []), ("n\n", ["0"])])
def test_purge_asks(
    umbel: Any, doubles: ModuleType, monkeypatch: pytest.MonkeyPatch, answer: str, left: list[str]
) -> None:
    import umbel.cli.output as output

    class Terminal:
        def __getattr__(self, name: str) -> Any:
            return getattr(sys.stdin, name)

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(output, "sys", type("sys", (), {"stdin": Terminal()}))
    fill(doubles, "mail", 1)
    result = umbel("purge", "mail", input=answer)
    assert "Delete 1 message of mail? [y/N]" in result.stdout
    assert result.exit_code == (1 if left else 0)
    assert doubles.waiting("mail") == left


def test_workers_answer(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("status", "--broker", "doubles:TalkingTransport", "--timeout", "50ms")
    assert result.exit_code == 0
    heading, row = result.stdout.splitlines()
    assert heading.split() == ["WORKER", "PID", "UPTIME", "POOL", "CONCURRENCY", "HELD", "POLLED", "DONE"]
    assert row.split() == ["w1@host", "42", "1h", "1m", "prefork", "4", "2", "0s", "12"]
    answers = json.loads(umbel("status", "--broker", "doubles:TalkingTransport", "--timeout", "50ms", "--json").stdout)
    assert answers["w1@host"]["pid"] == 42


def test_no_worker_answers(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("status", "--broker", "doubles:SilentTransport", "--timeout", "10ms")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no worker has answered" in result.stderr
    result = umbel("status", "--broker", "doubles:SilentTransport", "--timeout", "10ms", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (1, {})


def test_a_broker_without_broadcast_is_named(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("status")
    assert result.exit_code == 1
    assert "the broker doubles:FakeTransport has no broadcast" in result.stderr
