"""The imports point where ``.importlinter`` says; its lists are complete, and each of its contracts can break."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / ".importlinter"
SHELVES = ("core", "shared/*", "plugins/*", "contrib/*")
PACKAGES = sorted(path for shelf in SHELVES for path in ROOT.glob(f"{shelf}/src/umbel*"))
LIBRARIES = {path.name for path in ROOT.glob("shared/*/src/umbel*")}
"""What plugins are made of, and no plugins themselves."""
PLUGINS = {path.name for path in PACKAGES} - {"umbel"} - LIBRARIES

PLANTED = {
    "kernel": ("umbel/errors.py", "import umbel.model"),
    "acyclic": ("umbel/result.py", "import umbel.task"),
    "stevedore": ("umbel/codec.py", "import stevedore"),
    "cattrs": ("umbel/routing.py", "import cattrs"),
    "click": ("umbel/protocol.py", "import click"),
    "plugins": ("umbel_json/__init__.py", "import umbel_zlib"),
    "plugin-api": ("umbel_zlib/__init__.py", "import umbel.app"),
}
"""For each contract, an import that it must refuse."""


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(CONFIG)
    return parser


def lint(cwd: Path = ROOT, path: str = "") -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("lint-imports")
    command = [str(tool), "--config", str(CONFIG), "--no-logo", "--no-cache"]
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_imports_point_downwards() -> None:
    done = lint()
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_plugin_is_under_every_contract_about_plugins() -> None:
    parser = config()
    assert set(parser["importlinter"]["root_packages"].split()) == PLUGINS | LIBRARIES | {"umbel"}
    assert set(parser["importlinter:contract:plugin-api"]["source_modules"].split()) == PLUGINS | LIBRARIES
    independent, libraries, kernel = parser["importlinter:contract:plugins"]["layers"].strip().splitlines()
    assert {name.strip() for name in independent.split("|")} == PLUGINS
    assert {name.strip() for name in libraries.split("|")} == LIBRARIES
    assert kernel == "umbel"


def test_every_contract_can_break(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for module, planted in PLANTED.values():
        with (tmp_path / module).open("a") as file:
            file.write(f"\n{planted}\n")
    done = lint(cwd=tmp_path, path=str(tmp_path))
    parser = config()
    names = {section.rpartition(":")[2]: parser[section]["name"] for section in parser if "contract:" in section}
    assert names.keys() == PLANTED.keys()
    kept = [key for key, name in names.items() if f"{name} BROKEN" not in done.stdout]
    assert not kept, done.stdout + done.stderr
