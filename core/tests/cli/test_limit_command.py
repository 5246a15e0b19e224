"""``umbel limit``: what is asked of the workers, and how their answers are shown."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest

from umbel.cli import limit

ANSWERS: dict[str, Any] = {
    "w2": {"error": "no task is named 'tasks.add'"},
    "w1": {
        "tasks.add": {
            "rate_limit": "100/m",
            "rate_limit_scope": "fleet",
            "concurrency_limit": 3,
            "concurrency_key": "{tenant}",
            "time_limit": 30.0,
            "soft_time_limit": None,
        },
        "tasks.\x1bquiet": {"rate_limit": "1/s", "concurrency_limit": 2, "soft_time_limit": 1.5},
    },
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the workers were asked; they answer ``ANSWERS``."""
    asked: list[tuple[Any, ...]] = []

    async def ask(transport: Any, method: str, arguments: Any, *, destination: Any, timeout: float) -> Any:
        asked.append((method, arguments, destination, timeout))
        return ANSWERS

    monkeypatch.setattr(limit, "ask", ask)
    return asked


TALKING = ("--broker", "doubles:TalkingTransport")


def test_limits_are_shown_a_line_each_and_who_refuses_is_told_apart(
    umbel: Any, doubles: ModuleType, asked: list[Any]
) -> None:
    result = umbel("limit", *TALKING)
    assert asked == [("limit", {"task": None, "changes": {}}, None, 1.0)]
    heading, first, second = result.stdout.splitlines()
    assert heading.split() == ["WORKER", "TASK", "RATE", "AT", "ONCE", "TIME", "SOFT", "TIME"]
    assert first.split() == [
        "w1",
        "tasks.add",
        *["100/m", "in", "the", "fleet"],
        *["3", "for", "each", "{tenant}"],
        "30s",
        "-",
    ]
    assert second.split() == ["w1", "tasks.\\x1bquiet", "1/s", "2", "-", "1.5s"]
    assert result.stderr == "w2: no task is named 'tasks.add'\n"
    assert result.exit_code == 1


def test_what_is_given_is_changed_and_nothing_else(umbel: Any, doubles: ModuleType, asked: list[Any]) -> None:
    options = ["--rate", "10/s", "--scope", "fleet", "--concurrency", "off", "--time-limit", "1m", "--worker", "w1"]
    result = umbel("limit", "tasks.add", *options, "--timeout", "2s", "--json", *TALKING)
    changes = {"rate_limit": "10/s", "rate_limit_scope": "fleet", "concurrency_limit": None, "time_limit": 60}
    assert asked == [("limit", {"task": "tasks.add", "changes": changes}, ("w1",), 2.0)]
    assert json.loads(result.stdout)["w1"]["tasks.add"]["time_limit"] == 30


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--rate", "1/s"], "to change a limit, name the TASK"),
        (["tasks.add", "--rate", "often"], "'often' must be a rate"),
        (["tasks.add", "--concurrency", "0"], "'0' must be a whole number from 1, or off"),
        (["tasks.add", "--soft-time-limit", "soon"], "'soon' must be a duration"),
        (["tasks.add", "--scope", "world"], "'world' is not one of 'worker', 'fleet'"),
    ],
)
def test_wrong_usage_is_told_and_nobody_is_asked(
    umbel: Any, doubles: ModuleType, asked: list[Any], arguments: list[str], why: str
) -> None:
    result = umbel("limit", *arguments, *TALKING)
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.split())
    assert asked == []


def test_no_worker_and_no_broadcast_are_told(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("limit", "--broker", "doubles:SilentTransport", "--timeout", "10ms")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no worker has answered" in result.stderr
    result = umbel("limit")
    assert result.exit_code == 1
    assert "the broker doubles:FakeTransport has no broadcast" in result.stderr
