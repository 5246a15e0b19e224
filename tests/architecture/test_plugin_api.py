"""The plugin API is versioned: a change of it is seen, every driver says for which version it was written, others are refused."""

from __future__ import annotations

import difflib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest

from umbel import hookspecs
from umbel.errors import PluginApiMismatch
from umbel.plugins import kinds
from umbel.plugins.kinds import KINDS, SERIALIZER, refusal
from umbel.ports.serializer import Serializer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests/architecture/plugin_api.py"
TEXT = SCRIPT.with_suffix(".txt")


def written_anew() -> str:
    """What the script prints, in an interpreter that knows of no installed distribution."""
    command = [sys.executable, "-I", "-S", SCRIPT]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_change_of_the_plugin_api_is_in_its_text() -> None:
    changes = "\n".join(
        difflib.unified_diff(
            TEXT.read_text().splitlines(), written_anew().splitlines(), "text", "code", n=0, lineterm=""
        )
    )
    assert not changes, (
        f"{changes}\n\nThe plugin API has changed. docs/explanation/plugin-api-versions.md says what that means for"
        f" API_VERSION, now {hookspecs.API_VERSION}. Then write the text anew:\n\n"
        "    python tests/architecture/plugin_api.py > tests/architecture/plugin_api.txt\n"
    )


def test_the_text_is_complete() -> None:
    names = [line.partition(": ")[0] for line in TEXT.read_text().splitlines()]
    assert len(names) == len(set(names))
    for kind in KINDS:
        if kind.port is not None:
            module, _, port = kind.port.partition(":")
            told = {name.removeprefix(f"{module}.") for name in names if name.startswith(f"{module}.{port}")}
            abstract = {f"{port}.{name}" for name in resolve_name(kind.port).__abstractmethods__}
            assert {port, f"{port}.api_version"} | abstract <= told
    assert {n for n in vars(hookspecs) if n.startswith("umbel_")} == {
        n.rpartition(".")[2] for n in names if n.startswith("umbel.hookspecs.umbel_")
    }


# --- drivers --------------------------------------------------------------------------------------


def drivers() -> Iterator[tuple[str, str]]:
    """Group and ``module:object`` of every driver that the folders here offer."""
    groups = {kind.group for kind in KINDS if kind.port is not None}
    for path in sorted([*ROOT.glob("plugins/*/pyproject.toml"), *ROOT.glob("contrib/*/pyproject.toml")]):
        offered = tomllib.loads(path.read_text())["project"].get("entry-points", {})
        yield from ((group, target) for group, names in offered.items() if group in groups for target in names.values())


def test_every_first_party_driver_says_for_which_version_it_was_written() -> None:
    found = dict.fromkeys(drivers())
    assert len(found) >= 12
    silent = [target for _, target in found if "api_version" not in vars(resolve_name(target))]
    assert not silent, "without it, a driver claims whatever version the kernel has"


# --- refusal --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "behind"),
    [
        ((2, 3), None),
        ((2, 0), None),
        ((2, 4), "umbel-core"),
        ((3, 0), "umbel-core"),
        ((1, 9), "the plugin"),
        ((1, 3), "the plugin"),
    ],
)
def test_which_versions_a_kernel_takes(
    version: tuple[int, int], behind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "API_VERSION", (2, 3))

    class Driver(Serializer):
        api_version = version

    refused = refusal(SERIALIZER, Driver)
    if behind is None:
        assert refused is None
        return
    assert refused == (
        PluginApiMismatch,
        f"is for plugin API {version[0]}.{version[1]}, and this umbel-core has 2.3: upgrade {behind}",
    )
