"""Plugins that a stranger wrote do their work, installed and named in the settings, with no other change."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stranger import ROOT, Environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TASKS = """
from umbel import Umbel

app = Umbel("tasks")

@app.task
def add(x, y):
    return x + y
"""

Start = Callable[[], subprocess.Popen[str]]


@pytest.fixture
def start(environment: Environment, tmp_path: Path) -> Iterator[Start]:
    """Start ``umbel worker`` in the test's folder."""
    workers: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        with (tmp_path / "worker.log").open("w") as log:
            worker = subprocess.Popen(
                [environment.python, "-m", "umbel", "worker"],
                cwd=tmp_path,
                env=environment.variables,
                stdin=subprocess.DEVNULL,
                stderr=log,
                text=True,
            )
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.kill()
        worker.wait(30)


def umbel(environment: Environment, folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    words = [f"{name}={value}" for name, value in settings.items()]
    return environment.run("env", *words, environment.python, "-m", "umbel", *arguments, cwd=folder)


def end(worker: subprocess.Popen[str]) -> int:
    worker.send_signal(signal.SIGTERM)
    return worker.wait(60)


def test_a_serializer_runs_in_a_worker_by_its_name_in_the_settings(
    environment: Environment, tmp_path: Path, start: Start
) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "umbel.toml").write_text('app = "tasks"\n\n[codec]\nserializer = "note"\naccept = ["note"]\n')
    worker = start()
    call = ("call", "tasks.add", "2", "3", "--wait", "--timeout", "60")
    done = umbel(environment, tmp_path, *call)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr + (tmp_path / "worker.log").read_text()
    # It was this serializer that carried the task: a message in any other form is refused.
    refused = umbel(environment, tmp_path, *call, UMBEL_CODEC__SERIALIZER="json")
    assert refused.returncode == 1
    letters = umbel(environment, tmp_path, "dead-letters", "list")
    assert "application/json" in letters.stdout, letters.stdout + letters.stderr
    assert end(worker) == 0


DEMO = """
import sys
from indexer import FileIndex, app, index_file

handles = index_file.map_delay([(path,) for path in sys.argv[1:]])
outcomes = [handle.get(timeout=100, propagate=False) for handle in handles]
indexes = [outcome for outcome in outcomes if isinstance(outcome, FileIndex)]
print(len(indexes), sum(index.lines for index in indexes), [type(o).__name__ for o in outcomes if o not in indexes])
app.close()
"""
"""What ``demo/run.py`` does: send every file, gather what comes of it."""


def test_a_transport_over_a_folder_runs_the_demo(environment: Environment, tmp_path: Path, start: Start) -> None:
    shutil.copy(ROOT / "demo/indexer.py", tmp_path)
    shutil.copy(ROOT / "demo/broken.txt", tmp_path)
    settings = (ROOT / "demo/umbel.toml").read_text()
    assert settings.count('url = "sqlite:///demo.sqlite3"') == 2
    (tmp_path / "umbel.toml").write_text(settings.replace("sqlite:///demo.sqlite3", "shelf:///broker", 1))
    (tmp_path / "send.py").write_text(DEMO)
    files = sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))
    files += sorted((Path(sysconfig.get_path("stdlib")) / "asyncio").glob("*.py"))
    lines = sum(path.read_bytes().count(b"\n") for path in files)

    worker = start()
    done = environment.run("python", "send.py", *map(str, files), "broken.txt", cwd=tmp_path)
    assert done.stdout == f"{len(files)} {lines} ['SyntaxError']\n", done.stderr + (tmp_path / "worker.log").read_text()

    letters = umbel(environment, tmp_path, "dead-letters", "list")
    assert "indexer.index_file" in letters.stdout, letters.stdout + letters.stderr
    assert "SyntaxError" in letters.stdout
    assert "files" in umbel(environment, tmp_path, "queues").stdout
    assert end(worker) == 0, (tmp_path / "worker.log").read_text()
    assert list((tmp_path / "broker").iterdir()), "it was the folder that carried the messages"
