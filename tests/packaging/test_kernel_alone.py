"""The kernel's suite needs no plugin: it is green in an environment that has none, and in each that lacks one of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "template"))
try:
    from stranger import ROOT, Environment, fresh
finally:
    del sys.path[0]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EVERY = "every plugin"
LOOKING = ("plugins_command", "loader")
PLUGINS = sorted(
    path.parent.name for shelf in ("plugins", "contrib") for path in ROOT.glob(f"{shelf}/*/pyproject.toml")
)

Run = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Future[Run]]]:
    """What the suite said in each environment that is asked about; two run at once."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    asked = dict.fromkeys(spec.params["missing"] for spec in specs if spec and "missing" in spec.params)
    with ThreadPoolExecutor(2) as threads:
        yield {missing: threads.submit(run, missing, tmp_path_factory.mktemp("environment")) for missing in asked}


def run(missing: str, folder: Path) -> Run:
    """The suite without ``missing``. Where only one is, of the suite what lists and what resolves the names of all that is
    installed.
    """
    environment = fresh(folder)
    present = [] if missing == EVERY else [name for name in PLUGINS if name != missing]
    environment.borrow("umbel-core", "pytest-timeout", *(f"umbel-{name}" for name in present))
    lacks(environment, PLUGINS if missing == EVERY else [missing])
    part = ["core/tests"] if missing == EVERY else [f"core/tests/plugins/test_{name}.py" for name in LOOKING]
    # The fixtures of the whole repository, above core, start servers: they need libraries that are not there.
    command = ["-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--confcutdir", "core"]
    # A folder of its own for what its tests write: the one that all runs of a user share is swept by each of them.
    command += ["--basetemp", str(folder / "tests"), *part]
    return environment.run("python", *command, cwd=ROOT, timeout=280)


def lacks(environment: Environment, names: list[str]) -> None:
    code = "import sys, importlib.util as i; sys.exit(', '.join(n for n in sys.argv[1:] if i.find_spec(n)) or None)"
    done = environment.run("python", "-c", code, *(f"umbel_{name}" for name in names), cwd=ROOT)
    assert done.returncode == 0, f"not removed: {done.stderr}"


@pytest.mark.parametrize("missing", [EVERY, *PLUGINS])
def test_the_kernels_suite_is_green_without(missing: str, outcomes: Mapping[str, Future[Run]]) -> None:
    done = outcomes[missing].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
