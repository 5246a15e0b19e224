"""A run of many tests tells what fails, says what it was at when somebody ends it, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import parents, until
from whole_run import LONG, MARK, rank

ROOT = Path(__file__).parents[2]
TESTS = """
import subprocess, time

def test_fails():
    assert "this" == "that"

def test_takes_long():
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open("left", "w") as file:
        print(left.pid, file=file)
    time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_has_told_what_failed_and_leaves_no_process(end: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    log, left = tmp_path / "log", tmp_path / "left"
    env = {name: value for name, value in os.environ.items() if name != MARK and not name.startswith("PYTEST_")}
    env["PYTHONPATH"] = str(ROOT / "tests/support")
    command = [sys.executable, "-m", "pytest", "-p", "whole_run", "--numprocesses", "1", "--dist", "loadfile"]
    with log.open("wb") as out:
        run = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        until(lambda: left.exists() and left.read_text().endswith("\n"), "the second test begins", timeout=60)
        until(lambda: "assert 'this' == 'that'" in log.read_text(), f"the failure of the first is told: {log}")
        pid = int(left.read_text())
        time.sleep(2)  # the run hears of the start of a test by a way of its own, and nothing shows when
        os.kill(run.pid, end)
        assert run.wait(30) == -end
    finally:
        run.kill()
        run.wait(30)
    until(lambda: pid not in parents(), "what the test has started is gone")
    named = "when the run was ended: test_some.py::test_takes_long" in log.read_text()
    assert named is (end == signal.SIGTERM), log.read_text()


def test_what_takes_long_begins_first() -> None:
    missing = [prefix for prefix in LONG if not (ROOT / prefix).exists()]
    assert not missing
    names = ["core/tests/test_task.py", "tests/faults/test_faults_kills.py", LONG[0], "plugins/json/tests/test_json.py"]
    assert sorted(names, key=rank) == [names[2], names[1], names[3], names[0]]
