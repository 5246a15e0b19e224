"""The tutorial on plugins does what it says: a fresh environment, its commands in order, its output."""

from __future__ import annotations

import doctest
import importlib.util
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from stranger import BUNDLE, ROOT, Environment, fresh

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAGE = ROOT / "docs/tutorial/first-plugin.md"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def load_blocks() -> Any:
    spec = importlib.util.spec_from_file_location("umbel_docs_blocks", ROOT / "tests/docs/blocks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BLOCKS = load_blocks()


@pytest.fixture
def reader(wheels: list[Path], tmp_path: Path) -> Environment:
    """An environment as the page wants it: Umbel and cookiecutter, and what builds a wheel."""
    environment = fresh(tmp_path / "environment")
    environment.borrow("cookiecutter", "hatchling", "pip")
    environment.offer("cookiecutter", "pip", "pytest")
    ours = [f"umbel_{Path(name).name}-" for name in BUNDLE]
    environment.install(wheel for wheel in wheels if wheel.name.startswith(tuple(ours)))
    return environment


class Reader:
    """Does what the page says, in one folder after the other."""

    def __init__(self, environment: Environment, home: Path) -> None:
        self.home = self.here = home
        self.variables = {**environment.variables, "PIP_NO_BUILD_ISOLATION": "0", "HOME": str(home)}
        self.worker: subprocess.Popen[bytes] | None = None

    def run(self, command: str, cwd: Path) -> tuple[int, str]:
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=cwd,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=100,
        )
        return done.returncode, done.stdout

    def follow(self, block: Any) -> None:
        word, _, rest = block.note.partition(": ")
        if word in ("file", "in shop"):
            path = self.home / rest if word == "file" else self.home / "shop" / rest
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
        elif word == "change":
            self.change(self.here / rest, block.text.splitlines())
        elif word == "in a fresh environment":
            for command, expected in BLOCKS.commands(block.text):
                self.obey(command.strip(), expected, rest)

    def obey(self, command: str, expected: str, how: str) -> None:
        if command.startswith("cd "):
            self.here /= command.removeprefix("cd ")
        elif how.startswith("a worker in "):
            self.start(command, self.home / how.removeprefix("a worker in "))
        else:
            cwd = self.home / how.removeprefix("in ") if how.startswith("in ") else self.here
            status, said = self.run(command, cwd)
            assert status == int(how.partition("exits with ")[2] or 0), f"$ {command}\n{said}"
            wanted = expected.replace("…", "...")
            assert doctest.OutputChecker().check_output(wanted, said, FLAGS), f"$ {command}\n{said}"

    def change(self, path: Path, lines: list[str]) -> None:
        old = [line[1:] for line in lines if line.startswith("-")]
        new = [line[1:] for line in lines if line.startswith("+")]
        assert len(old) == len(new) == 1
        assert path.read_text().count(old[0]) == 1
        path.write_text(path.read_text().replace(old[0], new[0]))

    def start(self, command: str, cwd: Path) -> None:
        log = self.home / "worker.log"
        with log.open("wb") as output:
            self.worker = subprocess.Popen(["sh", "-c", f"exec {command}"], cwd=cwd, env=self.variables, stderr=output)
        deadline = time.monotonic() + 60
        while not log.read_text().rstrip().endswith("is ready"):
            assert self.worker.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.send_signal(signal.SIGTERM)
            try:
                assert self.worker.wait(60) == 0
            finally:
                self.worker.kill()
                self.worker.wait(30)


def test_the_tutorial_does_what_it_says(reader: Environment, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "umbel").symlink_to(ROOT)
    follower = Reader(reader, home)
    try:
        for block in BLOCKS.blocks(PAGE):
            follower.follow(block)
    finally:
        follower.stop()
    assert follower.worker is not None


def test_the_code_that_the_tutorial_shows_is_that_of_the_template(projects: dict[str, Path]) -> None:
    shown = [block.text for block in BLOCKS.blocks(PAGE) if block.language == "text" and not block.note]
    code = "".join(path.read_text() for path in projects["serializer"].rglob("*.py"))
    members = "\n".join(line.removeprefix("    ") for line in code.splitlines())
    assert len(shown) == 2
    assert shown[0] in members
    assert shown[1] in code
