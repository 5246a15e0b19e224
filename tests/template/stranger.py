"""What a stranger has who writes a plugin: the template, wheels of ours, and an environment.

It knows no package index, none of our settings, and not this checkout; the libraries that wheels depend on are links into
the environment that runs these tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable, Mapping
from importlib.metadata import distribution
from pathlib import Path

from attrs import frozen
from cookiecutter.main import cookiecutter
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "plugin-template"

NAMES = {
    "serializer": "note",
    "compressor": "squeeze",
    "transport": "shelf",
    "result_store": "ledger",
    "pool": "gang",
    "scheduler": "almanac",
    "hook": "tally",
    "command": "hello",
    "step": "pulse",
}
"""The plugin that each variant becomes."""
BUNDLE = ("core", "shared/children", "plugins/json", "plugins/sqlite", "plugins/prefork")
"""What ``pip install umbel`` brings."""


@frozen
class Environment:
    """A virtual environment, and how to run what is in it."""

    folder: Path

    @property
    def variables(self) -> Mapping[str, str]:
        foreign = ("PIP_", "UV_", "UMBEL_", "PYTHON", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return {
            **kept,
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INDEX": "1",
            "COLUMNS": "200",
        }

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def run(self, *command: str, cwd: Path, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, by its name or its path."""
        program = self.folder / "bin" / command[0]
        return subprocess.run(
            [str(program) if program.exists() else command[0], *command[1:]],
            cwd=cwd,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def install(self, wheels: Iterable[Path]) -> None:
        """Install wheels, and fail if one of them needs what is not there."""
        command = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-compile"]
        done = subprocess.run(
            [*command, *map(str, wheels)], env=self.variables, capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def borrow(self, *names: str) -> None:
        """Link to what this interpreter has of these distributions, and of all that they need."""
        site = Path(sysconfig.get_path("purelib", vars={"base": str(self.folder), "platbase": str(self.folder)}))
        wanted, seen = list(names), set[str]()
        while wanted:
            found = distribution(wanted.pop())
            if found.name in seen:
                continue
            seen.add(found.name)
            for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(str(found.locate_file(top)))
            wanted += applicable(found.requires or ())

    def offer(self, *names: str) -> None:
        """Make borrowed modules programs."""
        for name in names:
            program = self.folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec "{self.python}" -m {name} "$@"\n')
            program.chmod(0o755)


def applicable(requirements: Iterable[str]) -> list[str]:
    parsed = [Requirement(line) for line in requirements]
    return [each.name for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]


BUILD = """
import sys, tomllib
from pathlib import Path
from hatchling.builders.wheel import WheelBuilder

into, *folders = sys.argv[1:]
for folder in folders:
    assert tomllib.loads(Path(folder, "pyproject.toml").read_text())["build-system"]["build-backend"] == "hatchling.build"
    list(WheelBuilder(folder).build(directory=into, versions=["standard"]))
"""
"""What ``pip wheel`` has the build backend do, all in one process."""


def build(folders: Iterable[Path], into: Path) -> list[Path]:
    """Build a wheel of each project."""
    command = [sys.executable, "-c", BUILD, str(into), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(into.glob("*.whl"))


def render(into: Path, **answers: str) -> Path:
    """What ``cookiecutter plugin-template`` writes for these answers."""
    return Path(cookiecutter(str(TEMPLATE), no_input=True, extra_context=answers, output_dir=str(into)))


def fresh(folder: Path) -> Environment:
    """An environment that has what the kernel and its tests need, and no distribution of ours."""
    venv.create(folder, with_pip=False)
    environment = Environment(folder)
    environment.borrow(*applicable(distribution("umbel-core").requires or ()), "pytest", "hypothesis")
    return environment
