"""First-party plugins have the skeleton that the template gives to strangers, but for what the workspace holds for them."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from stranger import NAMES, ROOT, TEMPLATE

FIRST_PARTY = sorted(path.parent for shelf in ("plugins", "contrib") for path in ROOT.glob(f"{shelf}/*/pyproject.toml"))

HELD_BY_THE_WORKSPACE = {
    ".gitignore": ".gitignore of the repository",
    ".github/workflows/ci.yml": ".ci/run",
    "tests/test_installed.py": "tests/packaging/test_agreement.py",
}
"""Files that a project of its own needs, and what does their work for first-party plugins."""
TABLES_OF_THE_WORKSPACE = {"dependency-groups", "tool.pytest", "tool.mypy", "tool.ruff"}
"""Likewise: the root's pyproject.toml has them."""

PORTS = ("serializer", "compressor", "transport", "result_store", "pool", "scheduler")

every_plugin = pytest.mark.parametrize("folder", FIRST_PARTY, ids=lambda folder: folder.name)


def read(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def tables(config: Mapping[str, Any]) -> set[str]:
    return {name for name in config if name != "tool"} | {f"tool.{name}" for name in config["tool"]}


def offered(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Kind and module of every entry point."""
    points = config["project"]["entry-points"]
    return [
        (group.removeprefix("umbel.").removesuffix("s"), value.partition(":")[0])
        for group, names in points.items()
        for value in names.values()
    ]


@every_plugin
def test_its_pyproject_has_the_keys_of_the_template(folder: Path, projects: Mapping[str, Path]) -> None:
    ours = read(folder)
    for project in projects.values():
        theirs = read(project)
        assert tables(ours) == tables(theirs) - TABLES_OF_THE_WORKSPACE
        assert ours["project"].keys() - {"optional-dependencies"} == theirs["project"].keys()
        for key in ("version", "readme", "requires-python", "license"):
            assert ours["project"][key] == theirs["project"][key]
        assert ours["project"]["dependencies"][0] == theirs["project"]["dependencies"][0]
        assert ours["build-system"] == theirs["build-system"]
        package = f"umbel_{folder.name}"
        assert ours["tool"]["hatch"] == {"build": {"targets": {"wheel": {"packages": [f"src/{package}"]}}}}
        assert theirs["tool"]["hatch"].keys() == ours["tool"]["hatch"].keys()


@every_plugin
def test_its_files_are_those_of_the_template(folder: Path, projects: Mapping[str, Path]) -> None:
    package = f"umbel_{folder.name}"
    for kind, module in offered(read(folder)):
        skeleton = {
            re.sub(rf"\bumbel_{NAMES[kind]}\b", package, str(path.relative_to(projects[kind])))
            for path in projects[kind].rglob("*")
            if ".hypothesis" not in path.parts  # another test has run the project's own tests
            and (path.suffix in (".py", ".md", ".toml", ".yml", ".typed") or path.name == ".gitignore")
        }
        skeleton -= HELD_BY_THE_WORKSPACE.keys() | {"tests/test_contract.py"}
        assert not {name for name in skeleton if not (folder / name).is_file()}
        assert f"src/{module.replace('.', '/')}.py" in skeleton, f"{module} is not where the template has it"
        contract = f"{kind.title().replace('_', '')}Contract"
        assert kind not in PORTS or contract in contracts(folder), f"{folder.name} has no test that is a {contract}"
    visible = {path.name for path in folder.iterdir() if not path.name.startswith((".", "__"))} - {"build", "dist"}
    assert visible == {"LICENSE", "README.md", "pyproject.toml", "src", "tests"}


def contracts(folder: Path) -> set[str]:
    """The suites of the kit that the tests of a plugin subclass."""
    trees = [ast.parse(path.read_text()) for path in folder.glob("tests/**/*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {ast.unparse(base).rpartition(".")[2] for cls in classes for base in cls.bases}


def test_a_stranger_is_held_to_the_style_of_the_house(projects: Mapping[str, Path]) -> None:
    house = read(ROOT)["tool"]
    for project in projects.values():
        theirs = read(project)["tool"]
        assert theirs["ruff"]["line-length"] == house["ruff"]["line-length"]
        assert theirs["ruff"]["target-version"] == house["ruff"]["target-version"]
        assert set(theirs["ruff"]["lint"]["select"]) <= set(house["ruff"]["lint"]["select"])
        assert theirs["mypy"]["strict"] is house["mypy"]["strict"] is True
        assert theirs["pytest"]["ini_options"]["filterwarnings"] == house["pytest"]["ini_options"]["filterwarnings"]


def test_the_modules_of_the_template_keep_the_budget_of_a_module() -> None:
    sizes = {path.parent.name: len(path.read_text().splitlines()) for path in TEMPLATE.glob("templates/*/plugin.py")}
    assert sizes.keys() == NAMES.keys()
    assert max(sizes.values()) <= 400, sizes
