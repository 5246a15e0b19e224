"""Apps on fakes. Nothing here runs unless a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from umbel import Umbel

from .fakes import Fakes

MakeApp = Callable[..., Umbel]

SETTINGS: Mapping[str, Any] = {
    "broker.url": "fake://",
    "results.url": "fake://",
    "worker.pool": "inline",
    "worker.concurrency": 2,
    "worker.grace": 5,
}


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
def make_app(fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeApp]:
    """Make apps on the fakes that read no file and no environment, and close them at the end."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("UMBEL_")]:
        monkeypatch.delenv(name)
    made: list[Umbel] = []

    def make(
        settings: Mapping[str, Any] | None = None,
        *,
        name: str = "shop",
        plugins: Sequence[object] = (),
        **arguments: Any,
    ) -> Umbel:
        app = Umbel(name, plugins=[fakes, *plugins], settings={**SETTINGS, **(settings or {})}, **arguments)
        made.append(app)
        return app

    yield make
    for app in made:
        app.close()


@pytest.fixture
def app(make_app: MakeApp) -> Umbel:
    return make_app()
