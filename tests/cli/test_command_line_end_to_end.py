"""``umbel`` as a process, against real workers, the sqlite broker and store, and real pools."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

UMBEL = (sys.executable, "-m", "umbel.cli")

TASKS = """
import pathlib

from umbel import Umbel
from umbel.errors import Reject

app = Umbel("tasks")

@app.task
def add(x, y):
    return x + y

@app.task
def div(x, y):
    return x / y

@app.task
def picky(name):
    if not pathlib.Path("mended").exists():
        raise Reject(f"no {name}")
    return f"done {name}"
"""

TOML = """
app = "tasks"

[broker]
url = "sqlite:///here.sqlite3"

[results]
url = "sqlite:///here.sqlite3"

[worker]
pool = "{pool}"
concurrency = 2
name = "w1"
"""

Umbel = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def umbel(tmp_path: Path) -> Umbel:
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "umbel.toml").write_text(TOML.format(pool="threads"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*UMBEL, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )

    return run


@pytest.fixture
def start(umbel: Umbel, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        with (tmp_path / "worker.log").open("w") as log:
            worker = subprocess.Popen([*UMBEL, "worker", *arguments], cwd=tmp_path, stderr=log, text=True)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.wait(30)


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return done.stdout.splitlines()


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_worker_runs_what_is_called_and_stops_when_told(
    umbel: Umbel, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, pool: str
) -> None:
    (tmp_path / "umbel.toml").write_text(TOML.format(pool=pool))
    worker = start()
    done = umbel("call", "tasks.add", "2", "3", "--wait", "--timeout", "30s")
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")

    failed = umbel("call", "tasks.div", "1", "0", "--wait", "--timeout", "30s", "--id", "bad")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.endswith("Error: task bad failed: ZeroDivisionError: division by zero\n")
    assert "return x / y" in failed.stderr
    assert umbel("result", "bad").returncode == 1
    assert umbel("result", "never").returncode == 3

    (answer,) = json.loads(umbel("status", "--json").stdout).items()
    assert answer[0] == "w1"
    assert answer[1]["pool"]["max-concurrency"] == 2
    assert lines(umbel("status"))[1].split()[:2] == ["w1", str(worker.pid)]

    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=30) == 0
    log = (tmp_path / "worker.log").read_text()
    assert "w1 is ready" in log
    assert f"{pool}, 2 slots" in log
    assert "3 tasks: tasks.add, tasks.div, tasks.picky" in log
    assert umbel("status", "--timeout", "100ms").returncode == 1


def test_dead_letters_are_replayed(umbel: Umbel, start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    start()
    for name in ("a", "b", "c"):
        assert umbel("call", "tasks.picky", name, "--id", name, "--wait", "--timeout", "30s").returncode == 1
    assert umbel("call", "tasks.add", "1", "1", "--wait", "--timeout", "30s").stdout == "2\n"  # all are settled
    letters = json.loads(umbel("dead-letters", "list", "--json").stdout)
    assert [letter["id"] for letter in letters] == ["a", "b", "c"]
    assert "no b" in letters[1]["cause"]
    (shown,) = json.loads(umbel("dead-letters", "show", "b", "--json").stdout)
    assert shown["body"][0] == ["b"]

    (tmp_path / "mended").touch()
    assert umbel("dead-letters", "replay", "b").stdout == "1 dead letter replayed\n"
    done = umbel("result", "b", "--wait", "--timeout", "30s", "--json")
    assert (done.returncode, json.loads(done.stdout)["result"]) == (0, "done b")
    assert [letter["id"] for letter in json.loads(umbel("dead-letters", "list", "--json").stdout)] == ["a", "c"]

    assert umbel("dead-letters", "purge", "--all", "--cause", "no c", "--yes").stdout == "1 dead letter deleted\n"
    assert umbel("dead-letters", "replay", "--all").stdout == "1 dead letter replayed\n"
    assert umbel("result", "a", "--wait", "--timeout", "30s").returncode == 0
    assert "no dead letters" in umbel("dead-letters", "list").stderr


def test_the_broker_is_managed_without_the_tasks(umbel: Umbel, tmp_path: Path) -> None:
    (tmp_path / "umbel.toml").unlink()
    (tmp_path / "tasks.py").write_text("raise SystemError('not to be imported')")
    here = ("--broker", "sqlite:///other.sqlite3", "--results", "sqlite:///other.sqlite3")
    assert umbel("call", "far.away", "1", *here).returncode == 0
    assert umbel("call", "far.away", "1", "--countdown", "1h", *here).returncode == 0
    (queue,) = json.loads(umbel("queues", "--json", *here).stdout)
    assert (queue["queue"], queue["ready"], queue["delayed"]) == ("default", 1, 1)
    refused = umbel("purge", "default", *here)
    assert refused.returncode == 2
    assert "Delete 2 messages of default?" in refused.stderr
    assert umbel("purge", "default", "--yes", *here).stdout == "2 messages of default deleted\n"


def test_a_replay_leaves_the_counts_of_the_others(umbel: Umbel, tmp_path: Path) -> None:
    seed = """
import asyncio
from umbel.model import Message
from tasks import app

async def main():
    transport = app.make_transport()
    for n in range(300):
        headers = {"id": str(n), "task": "tasks.add", "umbel-dead-queue": "default", "umbel-dead-cause": "lost"}
        await transport.publish([Message(queue="default.dead", headers=headers, body=b"[[1, 2], {}, null]")], timeout=5)
    await transport.close()

async def counts():
    from umbel.ports.transport import Credit
    transport = app.make_transport()
    stream = transport.consume(["default.dead"], credit=Credit(1000), lease=5)
    seen = []
    async for batch in stream:
        seen += [(d.message.id, d.count) for d in batch]
        if len(seen) >= 299:
            break
    await stream.aclose()
    await transport.close()
    assert seen == [(str(n), 1) for n in range(300) if n != 250], seen
"""
    (tmp_path / "seed.py").write_text(seed)

    def run(call: str) -> None:
        script = f"import asyncio, seed; asyncio.run(seed.{call}())"
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)

    run("main")
    assert umbel("dead-letters", "replay", "250").stdout == "1 dead letter replayed\n"
    depths = {queue["queue"]: queue for queue in json.loads(umbel("queues", "--json").stdout)}
    assert (depths["default"]["ready"], depths["default.dead"]["ready"], depths["default.dead"]["leased"]) == (
        1,
        299,
        0,
    )
    run("counts")


@pytest.mark.parametrize("url", ["sqlite:////no/such/folder/x.sqlite3", "nosuch://x"])
def test_a_worker_that_cannot_start_says_why_in_a_sentence(umbel: Umbel, url: str) -> None:
    done = umbel("worker", "--broker", url)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_the_installed_plugins_have_no_errors(umbel: Umbel) -> None:
    records = json.loads(umbel("plugins", "--json").stdout)
    assert {"sqlite", "json", "prefork", "threads", "memory"} <= {record["name"] for record in records}
    assert {record["state"] for record in records} == {"ok"}
    assert umbel("plugins", "check").returncode == 0
    assert umbel("config", "check").returncode == 0
