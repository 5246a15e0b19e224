"""What the README promises of installing, with nothing but our own wheelhouse: only what was asked for arrives, and runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from pathlib import Path
from zipfile import ZipFile

import pytest
from attrs import frozen
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TASKS = """
from umbel import Umbel

app = Umbel("tasks")

@app.task
def add(x, y):
    return x + y
"""

IN_ONE_PROCESS = """
import threading
from umbel import Umbel

app = Umbel("tasks", broker="memory://one", results="memory://one", settings={"worker.pool": "threads"})

@app.task
def add(x, y):
    return x + y

worker = app.worker()
thread = threading.Thread(target=worker.run)
thread.start()
try:
    print(add.delay(2, 3).get(timeout=30))
finally:
    worker.request_stop()
    thread.join(30)
"""


@frozen
class Environment:
    """A virtual environment that knows no package index, no settings of ours, and not this checkout."""

    folder: Path

    @property
    def variables(self) -> Mapping[str, str]:
        foreign = ("PIP_", "UV_", "UMBEL_", "PYTHON", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def command(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def run(self, *command: str, cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.command(command[0]), *command[1:]],
            cwd=cwd,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def pip(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "pip", "--python", self.command("python"), *arguments]
        done = subprocess.run(command, env=self.variables, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def brought(self) -> set[str]:
        """The distributions that are there."""
        return {canonicalize_name(line.partition("==")[0]) for line in self.pip("freeze", "--all").splitlines()}

    def ours(self) -> set[str]:
        """Those of Umbel."""
        return {name for name in self.brought() if name.startswith("umbel")}


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make wheels`` makes."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    done = subprocess.run([ROOT / "scripts/wheels", folder], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


Make = Callable[..., Environment]


@pytest.fixture(scope="module")
def installed(wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a fresh environment and install what is asked for from the wheelhouse alone."""

    def make(*requirements: str) -> Environment:
        folder = tmp_path_factory.mktemp("venv")
        venv.create(folder, with_pip=False)
        environment = Environment(folder)
        environment.pip(
            "install", "--quiet", "--no-compile", "--no-index", "--find-links", str(wheelhouse), *requirements
        )
        return environment

    return make


@pytest.fixture(scope="module")
def bundle(installed: Make) -> Environment:
    """``pip install umbel``."""
    return installed("umbel")


def names(*suffixes: str) -> set[str]:
    return {f"umbel-{suffix}" for suffix in suffixes}


KERNELS = {"umbel-core", "attrs", "cattrs", "click", "pluggy", "stevedore", "typing-extensions"}
"""The kernel and all that it brings."""


def test_every_wheel_is_typed_and_carries_the_licence_and_no_tests(wheelhouse: Path) -> None:
    wheels = {path.name.partition("-")[0]: path for path in wheelhouse.glob("umbel*.whl")}
    shelves = ("core", "shared/*", "plugins/*", "contrib/*")
    folders = [path.parent for shelf in shelves for path in ROOT.glob(f"{shelf}/pyproject.toml")]
    assert wheels.keys() == {"umbel", *(f"umbel_{folder.name}" for folder in folders)}
    for name, path in wheels.items():
        files = ZipFile(path).namelist()
        package = "umbel" if name == "umbel_core" else name
        outside = [file for file in files if not file.startswith((f"{package}/", f"{name}-"))]
        assert not outside, f"{path.name} brings more than one package: {outside}"
        assert [file for file in files if file.endswith(".dist-info/licenses/LICENSE")]
        if name == "umbel":
            assert all(".dist-info/" in file for file in files), "the bundle has no code"
        else:
            assert f"{package}/py.typed" in files
            assert not [file for file in files if re.search(r"(^|/)(tests?|conftest|test_\w+\.py)(/|$)", file)]


def test_the_bundle_says_its_extras(wheelhouse: Path) -> None:
    (wheel,) = wheelhouse.glob("umbel-*.whl")
    metadata = ZipFile(wheel).read(f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/METADATA").decode()
    assert "Provides-Extra: threads\n" in metadata
    assert re.search(r"^Requires-Dist: umbel-threads.*; extra == 'threads'$", metadata, re.MULTILINE)


def test_umbel_brings_what_needs_no_server(bundle: Environment) -> None:
    assert bundle.ours() == {"umbel"} | names("core", "json", "sqlite", "prefork", "children")


def test_extras_and_aliases_bring_what_they_name_and_nothing_else(installed: Make) -> None:
    environment = installed("umbel[msgpack,rabbitmq]")
    assert environment.ours() == {"umbel"} | names("core", "json", "sqlite", "prefork", "children", "msgpack", "amqp")
    assert environment.brought() - environment.ours() - KERNELS == {"msgpack", "pamqp"}


def test_the_minimal_way_brings_nothing_else_and_works(installed: Make, tmp_path: Path) -> None:
    environment = installed("umbel-core", "umbel-json", "umbel-memory", "umbel-threads")
    assert environment.brought() == KERNELS | names("json", "memory", "threads", "children")
    done = environment.run("python", "-c", IN_ONE_PROCESS, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr


def test_a_first_task_runs(bundle: Environment, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    log = tmp_path / "worker.log"
    with log.open("w") as output:
        worker = subprocess.Popen(
            [bundle.command("umbel"), "-A", "tasks", "worker", "--queues", "default"],
            cwd=tmp_path,
            env=bundle.variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        done = bundle.run(
            "umbel", "-A", "tasks", "call", "tasks.add", "2", "3", "--wait", "--timeout", "50", cwd=tmp_path
        )
        assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr + log.read_text()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(40) == 0, log.read_text()
    finally:
        worker.kill()
        worker.wait(30)


def test_a_plugin_that_is_missing_is_named_with_its_remedy(installed: Make, tmp_path: Path) -> None:
    environment = installed("umbel")
    environment.pip("uninstall", "--yes", "--quiet", "umbel-sqlite")
    (tmp_path / "tasks.py").write_text(TASKS)
    done = environment.run("umbel", "-A", "tasks", "worker", "--queues", "default", cwd=tmp_path)
    assert done.returncode > 0
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("Error: ")
    assert 'pip install "umbel[sqlite]"' in said
