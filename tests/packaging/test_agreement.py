"""One word serves everywhere: extra = folder = distribution suffix = module suffix = entry-point name."""

from __future__ import annotations

import importlib
import re
import tomllib
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

BUNDLED = ("core", "json", "sqlite", "prefork")
"""What ``pip install umbel`` brings."""

ALIASES = {"rabbitmq": "amqp", "librabbitmq": "amqp", "valkey": "redis"}
"""Names that users know from the field and that no plugin offers, each with the plugin that is meant."""

NAME_OF_AN_EXTRA = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
"""Not every name of an entry point is one: ``celery+redis`` is a URL scheme, and no requirement can say it."""

GROUPS = {
    "umbel.transports",
    "umbel.serializers",
    "umbel.compressors",
    "umbel.pools",
    "umbel.result_stores",
    "umbel.schedulers",
    "umbel.hooks",
    "umbel.commands",
}


def read(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def folders(*patterns: str) -> list[Path]:
    return sorted(path.parent for pattern in patterns for path in ROOT.glob(f"{pattern}/pyproject.toml"))


def offered(project: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The entry points that a plugin's ``pyproject.toml`` declares: group, name, value."""
    groups = project["project"].get("entry-points", {})
    return [(group, name, value) for group, points in groups.items() for name, value in points.items()]


BUNDLE = read(ROOT)
VERSION = BUNDLE["project"]["version"]
SERIES = f"~= {VERSION}"
PLUGINS = folders("plugins/*", "contrib/*")
LIBRARIES = folders("shared/*")
"""What several plugins are made of: distributions that offer nothing by themselves."""
MEMBERS = [ROOT / "core", *LIBRARIES, *PLUGINS]

every_plugin = pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)


def test_every_folder_of_plugins_is_a_distribution() -> None:
    shelves = [path for pattern in ("plugins/*/", "contrib/*/") for path in ROOT.glob(pattern)]
    assert sorted(path for path in shelves if not path.name.startswith((".", "__"))) == PLUGINS


def test_the_workspace_knows_every_distribution() -> None:
    uv = BUNDLE["tool"]["uv"]
    assert folders(*uv["workspace"]["members"]) == sorted(MEMBERS)
    assert uv["sources"] == {"umbel": {"workspace": True}} | {
        f"umbel-{folder.name}": {"workspace": True} for folder in MEMBERS
    }


def test_all_versions_are_one() -> None:
    assert {folder.name: read(folder)["project"]["version"] for folder in MEMBERS} == {
        folder.name: VERSION for folder in MEMBERS
    }
    for folder in [ROOT, *MEMBERS]:
        project = read(folder)["project"]
        optional = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
        siblings = [line for line in project["dependencies"] + optional if re.match(r"umbel-\w+", line)]
        assert all(line.endswith(SERIES) for line in siblings), f"{folder.name}: siblings are depended on with {SERIES}"


def test_the_bundle_runs_without_a_server() -> None:
    assert BUNDLE["project"]["dependencies"] == [f"umbel-{name} {SERIES}" for name in BUNDLED]


def test_there_is_an_extra_for_every_plugin_every_name_it_offers_and_every_alias() -> None:
    plugin_of = {
        name: folder.name
        for folder in PLUGINS
        for name in {folder.name, *(name for _, name, _ in offered(read(folder)))}
        if NAME_OF_AN_EXTRA.fullmatch(name)
    }
    assert not plugin_of.keys() & ALIASES.keys(), "offered by a plugin, and so no alias"
    assert set(ALIASES.values()) <= {folder.name for folder in PLUGINS}
    extras = dict(BUNDLE["project"]["optional-dependencies"])
    everything = re.fullmatch(r"umbel\[([\w,]+)\]", *extras.pop("all"))
    assert extras == {name: [f"umbel-{plugin} {SERIES}"] for name, plugin in (plugin_of | ALIASES).items()}
    assert everything
    assert sorted(everything[1].split(",")) == sorted(folder.name for folder in PLUGINS)


@every_plugin
def test_all_names_that_a_plugin_offers_of_one_kind_mean_the_same(folder: Path) -> None:
    """So a URL's scheme decides where to connect, and never which code runs."""
    targets: dict[str, set[str]] = {}
    for group, _, value in offered(read(folder)):
        targets.setdefault(group, set()).add(value)
    assert all(len(values) == 1 for values in targets.values()), targets


def test_no_name_is_offered_twice() -> None:
    names = sorted((group, name) for folder in PLUGINS for group, name, _ in offered(read(folder)))
    assert all(one != other for one, other in pairwise(names))


@every_plugin
def test_every_plugin_has_the_one_shape(folder: Path) -> None:
    name = folder.name
    config, template = read(folder), read(ROOT / "core")
    project = config["project"]
    assert config["build-system"] == template["build-system"]
    assert config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [f"src/umbel_{name}"]
    keys = {"name", "version", "description", "readme", "requires-python", "license", "dependencies", "entry-points"}
    assert keys <= project.keys() <= keys | {"optional-dependencies"}
    assert project["name"] == f"umbel-{name}"
    assert project["dependencies"][0] == f"umbel-core {SERIES}"
    assert all(project[key] == template["project"][key] for key in ("readme", "requires-python", "license"))
    assert (folder / f"src/umbel_{name}/__init__.py").is_file()
    assert (folder / f"src/umbel_{name}/py.typed").is_file()
    assert [path.name for path in (folder / "src").iterdir() if path.suffix != ".egg-info"] == [f"umbel_{name}"]
    assert list((folder / "tests").rglob("test_*.py")), f"{name} has no tests"


@pytest.mark.parametrize("folder", LIBRARIES, ids=lambda folder: folder.name)
def test_every_library_has_the_shape_of_a_plugin_and_offers_nothing(folder: Path) -> None:
    config, template = read(folder), read(ROOT / "core")
    project = config["project"]
    assert config["build-system"] == template["build-system"]
    assert project["name"] == f"umbel-{folder.name}"
    assert project["dependencies"] == [f"umbel-core {SERIES}"]
    assert not offered(config)
    assert f"umbel-{folder.name}" not in str(BUNDLE["project"]), "plugins bring it"
    assert any(f"umbel-{folder.name} {SERIES}" in read(plugin)["project"]["dependencies"] for plugin in PLUGINS)
    assert (folder / f"src/umbel_{folder.name}/py.typed").is_file()
    assert list((folder / "tests").rglob("test_*.py")), f"{folder.name} has no tests"


def test_the_readme_names_every_plugin_and_alias() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = {row.split("`")[1]: row for row in readme.splitlines() if row.startswith("| [`")}
    assert rows.keys() == {folder.name for folder in PLUGINS}
    for folder in PLUGINS:
        assert f"]({folder.relative_to(ROOT)}/README.md)" in rows[folder.name]
    for alias, plugin in ALIASES.items():
        assert f"`{alias}`" in rows[plugin]


def test_every_distribution_carries_the_licence() -> None:
    for folder in MEMBERS:
        assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes(), folder.name
        assert read(folder)["project"]["license"] == BUNDLE["project"]["license"]


@every_plugin
def test_every_entry_point_leads_to_what_it_names(folder: Path) -> None:
    points = offered(read(folder))
    assert folder.name in {name for _, name, _ in points}
    for group, name, value in points:
        module, _, attribute = value.partition(":")
        assert group in GROUPS
        assert module.startswith(f"umbel_{folder.name}."), (
            f"{value}: name the leaf module, to import no more than asked for"
        )
        assert hasattr(importlib.import_module(module), attribute), f"{group} {name}: {module} has no {attribute}"


@every_plugin
def test_what_is_installed_is_what_is_declared(folder: Path) -> None:
    installed = distribution(f"umbel-{folder.name}")
    points = {(point.group, point.name, point.value) for point in installed.entry_points}
    assert points == set(offered(read(folder))), "stale; run `make setup`"
    assert installed.version == VERSION


@every_plugin
def test_every_readme_tells_settings_and_guarantees(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    assert readme.startswith(f"# umbel-{folder.name}\n")
    assert f'pip install "umbel[{folder.name}]"' in readme
    sections = {part.partition("\n")[0]: part for part in re.split(r"^## ", readme, flags=re.MULTILINE)[1:]}
    for title in ("Settings", "Guarantees"):
        assert title in sections, f"{folder.name}/README.md has no section ## {title}"
        assert re.search(r"^\| *-{3}", sections[title].replace("|-", "| -"), re.MULTILINE), f"no table under ## {title}"
