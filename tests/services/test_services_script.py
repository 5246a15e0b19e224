"""`scripts/services`, with programs in place of those that would change the machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/services"
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
TOOLS = ("sh", "dirname", "mkdir", "env")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Where the programs in place of others write how they were called."""
    return tmp_path / "calls"


@pytest.fixture
def run(tmp_path: Path, calls: Path) -> Run:
    """Run a copy of the script, with nothing on PATH but a few tools and what the test puts there."""
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "scripts")
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found
        (programs / tool).symlink_to(found)

    def run(*arguments: str, **bodies: str) -> subprocess.CompletedProcess[str]:
        for name, body in bodies.items():
            program = programs / name.replace("_", "-")
            program.write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >>{calls}\n{body}\n')
            program.chmod(0o755)
        environment = {"PATH": str(programs), "TEST_REDIS_SERVER": "no-such-server"}
        return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, timeout=60)

    return run


def called(calls: Path) -> list[str]:
    return [line for line in calls.read_text().splitlines() if not line.startswith("id ")] if calls.exists() else []


def test_root_installs_what_is_missing(run: Run, calls: Path, tmp_path: Path) -> None:
    done = run(id="echo 0", apt_get="", npm="")
    assert done.returncode == 0, done.stderr
    update, install, npm = called(calls)
    assert update == "apt-get update -qq"
    assert install.startswith("apt-get install -qq -y --no-install-recommends no-such-server")
    assert npm.startswith("npm install --prefix .services/node")
    assert (tmp_path / ".services/.gitignore").read_text() == "*\n"


def test_a_user_is_told_the_command(run: Run, calls: Path) -> None:
    done = run(id="echo 1000", apt_get="", npm="")
    assert done.returncode == 1
    assert "run 'sudo apt-get install --no-install-recommends no-such-server" in done.stderr
    assert called(calls) == []


def test_a_user_who_may_become_root_without_a_password_does(run: Run, calls: Path) -> None:
    done = run(id="echo 1000", sudo="", apt_get="", npm="")
    assert done.returncode == 0, done.stderr
    assert called(calls)[:2] == ["sudo -n true", "sudo apt-get update -qq"]


@pytest.mark.parametrize(
    ("bodies", "said"),
    [
        ({"id": "echo 1000", "sudo": "", "apt_get": ""}, "run 'sudo apt-get install"),
        ({"id": "echo 0", "apt_get": "exit 100"}, "apt-get did not install"),
        ({"id": "echo 0"}, "no apt-get"),
        ({"id": "echo 0", "apt_get": "", "npm": "exit 1"}, "npm did not install celery-node"),
    ],
)
def test_make_test_goes_on_without(run: Run, calls: Path, bodies: dict[str, str], said: str) -> None:
    done = run("--if-allowed", **bodies)
    assert done.returncode == 0
    assert said in done.stderr
    assert not any(call.startswith("sudo") for call in called(calls))
    assert run(**(bodies | {"sudo": "exit 1"})).returncode == 1


def test_nothing_is_done_where_all_is_there(
    run: Run, calls: Path, tmp_path: Path, absent: Callable[[str], NoReturn]
) -> None:
    if not RABBITMQ.exists():
        absent(f"no {RABBITMQ} on this machine (make services installs what the tests need)")
    package = tmp_path / ".services/node/node_modules/celery-node/package.json"
    package.parent.mkdir(parents=True)
    package.touch()
    done = run(no_such_server="", npm="", apt_get="")
    assert (done.returncode, done.stderr) == (0, "")
    assert called(calls) == []
