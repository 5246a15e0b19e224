"""``umbel schedule`` and ``umbel scheduler --status``, as typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from servers.process import free_port

from umbel.cli.group import root

Umbel = Callable[..., str]

TASKS = """
from umbel import Umbel

app = Umbel("office")

@app.task
def add(x, y): return x + y

@app.task
def quick(): ...

@app.task(unique="until_done")
def once(): ...
"""
SETTINGS = """
timezone = "Asia/Seoul"
broker.url = "sqlite:///office.sqlite3"
results.url = "sqlite:///office.sqlite3"

[schedules.declared]
task = "office.quick"
every = "1h"
"""


@pytest.fixture
def umbel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Umbel]:
    """``umbel("schedule", "list")``: run it in a project's folder, in this process; what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "office.py").write_text(TASKS)
    (tmp_path / "umbel.toml").write_text(SETTINGS)

    def run(*arguments: str, status: int = 0) -> str:
        sys.modules.pop("office", None)
        done = CliRunner().invoke(root, ["-A", "office", *arguments], prog_name="umbel")
        assert done.exit_code == status, done.output
        return done.output

    yield run
    sys.modules.pop("office", None)


def test_an_entry_s_life(umbel: Umbel) -> None:
    assert "declared, and added when a scheduler starts: declared" in umbel("schedule", "list")
    made = umbel(
        *(
            "schedule",
            "create",
            "sums",
            "office.add",
            "--crontab",
            "0 3 * * mon-fri",
            "--overlap",
            "skip",
            "--jitter",
            "1m",
        ),
        *("--arg", "2", "--kw", "y=3", "--priority", "4", "--expires", "1h"),
    )
    assert "0 3 * * mon-fri Asia/Seoul" in made
    shown = json.loads(umbel("schedule", "show", "sums", "--json"))
    assert (shown["args"], shown["kwargs"], shown["options"]) == ([2], {"y": 3}, {"priority": 4, "expires": 3600.0})
    assert (shown["overlap"], shown["jitter"], shown["timezone"]) == ("skip", 60.0, "Asia/Seoul")
    assert len(shown["upcoming"]) == 3
    assert len(umbel("schedule", "next", "sums", "-n", "4").splitlines()) == 4
    umbel("schedule", "change", "sums", "--every", "10m", "--queue", "mail")
    changed = json.loads(umbel("schedule", "show", "sums", "--json"))
    assert (changed["when"], changed["options"]["queue"], changed["options"]["priority"]) == (
        {"every": 600.0},
        "mail",
        4,
    )
    assert "paused" in umbel("schedule", "pause", "sums")
    assert "paused" in umbel("schedule", "list")
    assert "waits for its time" in umbel("schedule", "resume", "sums")
    task_id = json.loads(umbel("schedule", "trigger", "sums", "--json"))["task_id"]
    (mail,) = (row for row in json.loads(umbel("queues", "--json")) if row["queue"] == "mail")
    assert (mail["ready"], bool(task_id)) == (1, True)
    assert "give --yes" in umbel("schedule", "delete", "sums", status=2)
    umbel("schedule", "delete", "sums", "--yes")
    assert "there is no schedule 'sums'" in umbel("schedule", "show", "sums", status=1)


def test_one_off_and_plugins_and_mistakes(umbel: Umbel) -> None:
    assert "at 2090-01-01 08:00:00" in umbel("schedule", "create", "once", "office.quick", "--at", "2090-01-01T08:00")
    cases: dict[tuple[str, ...], tuple[int, str]] = {
        ("create", "x", "office.none", "--every", "1h"): (1, "--unchecked makes it all the same"),
        ("create", "x", "office.quick"): (1, "needs one of crontab, every, at or when"),
        ("create", "x", "office.quick", "--crontab", "nonsense"): (1, "has 1 fields"),
        ("create", "x", "office.quick", "--when", "[1]"): (2, "must be a JSON object"),
        ("create", "x", "office.quick", "--when", '{"moon": 1}'): (1, "no timetable is made of 'moon'"),
        ("create", "x", "office.quick", "--every", "1h", "--kw", "x"): (2, "is not KEY=VALUE"),
        ("change", "once"): (2, "nothing is to be changed"),
    }
    for arguments, (status, said) in cases.items():
        assert said in umbel("schedule", *arguments, status=status)


def test_who_leads_and_where_entries_are(umbel: Umbel) -> None:
    told: dict[str, Any] = json.loads(umbel("scheduler", "--status", "--json"))
    assert (told["leader"], told["entries"], told["store"]["from"]) == (None, 0, "[results] url")
    umbel("schedule", "create", "e", "office.quick", "--every", "1h")
    assert "leader     none" in umbel("scheduler", "--status")
    told = json.loads(umbel("scheduler", "--status", "--json"))
    assert (told["entries"], told["next"]["name"], told["overdue"]) == (1, "e", 0.0)
    assert "give both" in umbel("scheduler", "--json", status=2)
    settings = json.loads(umbel("config", "show", "--json"))["settings"]
    assert settings["scheduler.url"] == {
        "value": "sqlite:///office.sqlite3",
        "origin": "default: as [results] url",
    }
    umbel("config", "check")
    wrong = ("-o", "schedules.x.task=office.quick", "-o", "schedules.x.crontab=61 * * * *")
    assert "61 is no minute" in umbel(*wrong, "config", "check", status=1)


def test_a_store_that_cannot_be_reached_is_told_in_one_sentence(umbel: Umbel) -> None:
    away = ("-o", f"scheduler.url=redis://127.0.0.1:{free_port()}/0", "-o", "scheduler.options.timeout=2")
    for arguments in (("schedule", "list"), ("schedule", "pause", "e"), ("scheduler", "--status"), ("scheduler",)):
        said = umbel(*away, *arguments, status=1).splitlines()[-1]
        assert said.startswith("Error: "), said
        assert "127.0.0.1" in said


def test_a_unique_task_that_is_not_sent_is_told(umbel: Umbel) -> None:
    umbel("schedule", "create", "e", "office.once", "--every", "1h")
    umbel("schedule", "trigger", "e")
    assert "has the same unique key" in umbel("schedule", "trigger", "e", status=1)
