"""Every variant of the template as a stranger would have it: rendered, built, and installed beside the kernel's wheel."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stranger import BUNDLE, NAMES, ROOT, Environment, build, fresh, render


@pytest.fixture(scope="session")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Every variant, rendered."""
    folder = tmp_path_factory.mktemp("projects")
    return {port: render(folder, name=name, port=port) for port, name in NAMES.items()}


@pytest.fixture(scope="session")
def wheels(projects: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheels of every variant, and of what ``pip install umbel`` brings."""
    sources = [*projects.values(), *(ROOT / name for name in BUNDLE)]
    return build(sources, tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def environment(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """One environment with every wheel."""
    environment = fresh(tmp_path_factory.mktemp("environment"))
    environment.install(wheels)
    return environment
