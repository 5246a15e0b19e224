"""Every variant of the template works as it is rendered: its tests, its style and its types."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import pytest
from cookiecutter.exceptions import FailedHookException
from stranger import NAMES, Environment, render

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

every_port = pytest.mark.parametrize("port", NAMES)

Check = Callable[[str, str], subprocess.CompletedProcess[str]]


def commands(environment: Environment, scratch: Path, port: str) -> Mapping[str, list[str]]:
    tool = [sys.executable, "-m"]
    # A folder of its own for what tests write: the one that all runs of a user share is swept by each of them.
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", str(scratch / port)]
    return {
        "tests": [environment.python, "-m", "pytest", *options],
        "style": [*tool, "ruff", "check", "--no-cache", "."],
        "format": [*tool, "ruff", "format", "--no-cache", "--check", "--diff", "."],
        "types": [*tool, "mypy", "--python-executable", environment.python, "--cache-dir", str(scratch / "mypy")],
    }


@pytest.fixture(scope="module")
def check(
    projects: Mapping[str, Path],
    environment: Environment,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Check]:
    """The outcome of one check of one variant. All that were asked for run beside each other: most of it is waiting."""
    asked = {
        (item.callspec.params["port"], item.callspec.params["what"])
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and {"port", "what"} <= item.callspec.params.keys()
    }
    scratch = tmp_path_factory.mktemp("scratch")
    with ThreadPoolExecutor(3) as crew, ThreadPoolExecutor(1) as mypy:  # which has one cache
        outcomes: Mapping[tuple[str, str], Future[subprocess.CompletedProcess[str]]] = {
            (port, what): (mypy if what == "types" else crew).submit(
                environment.run, *commands(environment, scratch, port)[what], cwd=projects[port], timeout=200
            )
            for port, what in sorted(asked, key=lambda pair: pair[1] != "tests")
        }
        yield lambda port, what: outcomes[port, what].result()


@pytest.mark.parametrize("what", ["tests", "style", "format", "types"])
@every_port
def test_a_variant_is_green_as_it_is_rendered(port: str, what: str, check: Check) -> None:
    done = check(port, what)
    assert done.returncode == 0, done.stdout + done.stderr
    if what == "tests":
        assert "passed" in done.stdout
        assert "skipped" not in done.stdout


@every_port
def test_every_variant_has_the_same_skeleton(port: str, projects: Mapping[str, Path]) -> None:
    name, project = NAMES[port], projects[port]
    assert project.name == f"umbel-{name}"
    assert {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file() and not ignored(path)} == {
        ".github/workflows/ci.yml",
        ".gitignore",
        "README.md",
        "pyproject.toml",
        f"src/umbel_{name}/__init__.py",
        f"src/umbel_{name}/{port}.py",
        f"src/umbel_{name}/py.typed",
        "tests/test_contract.py",
        "tests/test_installed.py",
    }


def ignored(path: Path) -> bool:
    """Whether it was made by a tool, after rendering."""
    return any(part in ("__pycache__", ".hypothesis", ".ruff_cache", ".mypy_cache", "build") for part in path.parts)


@every_port
def test_nothing_of_the_template_is_left_over(port: str, projects: Mapping[str, Path]) -> None:
    for path in projects[port].rglob("*"):
        if path.is_file() and not ignored(path):
            text = path.read_text()
            assert "cookiecutter" not in text
            assert "{%" not in text
            assert "\n\n\n\n" not in text
            assert text == "" or (text.endswith("\n") and not text.endswith("\n\n")), path
    assert "python-version: ${{ matrix.python }}\n" in (projects[port] / ".github/workflows/ci.yml").read_text()


@every_port
def test_the_wheel_is_typed_and_carries_no_tests(port: str, wheels: list[Path]) -> None:
    package = f"umbel_{NAMES[port]}"
    (wheel,) = [path for path in wheels if path.name.startswith(f"{package}-")]
    files = {name for name in ZipFile(wheel).namelist() if not name.startswith(f"{package}-")}
    assert files == {f"{package}/__init__.py", f"{package}/py.typed", f"{package}/{port}.py"}


def test_umbel_lists_every_variant_and_finds_nothing_wrong(environment: Environment, tmp_path: Path) -> None:
    listed = environment.run("python", "-m", "umbel", "plugins", cwd=tmp_path)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    for name in NAMES.values():
        (line,) = [line for line in listed.stdout.splitlines() if f" umbel-{name} " in line]
        assert line.rstrip().endswith("ok"), line


@pytest.mark.parametrize("name", ["x", "rhododendron"])
def test_the_style_does_not_hang_on_the_length_of_the_name(name: str, tmp_path: Path) -> None:
    for port in NAMES:
        render(tmp_path / port, name=name, port=port, author="Ada", description="Words of its own")
    for command in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Shelf", "book_shelf", "book-shelf", "2nd", "core", ""])
def test_a_name_that_could_not_serve_everywhere_is_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FailedHookException):
        render(tmp_path, name=name, port="serializer")
    assert "one word of lower-case letters and digits" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
