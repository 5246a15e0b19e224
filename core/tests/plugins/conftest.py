"""Distributions that are not there: real metadata and modules in a directory of the test's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import dedent

import pytest

from umbel.plugins import loader

Install = Callable[..., None]

DRIVERS = """
    from umbel.markers import hookimpl
    from umbel.ports.pool import Pool
    from umbel.ports.serializer import Serializer
    from umbel.ports.transport import Transport

    class FakeTransport(Transport):
        api_version = (1, 0)
        async def publish(self, messages, *, timeout): ...
        def consume(self, queues, *, credit, lease): ...
        async def settle(self, settlements): ...
        async def renew(self, deliveries, *, lease, starting=False): ...
        async def declare(self, queues): ...
        async def purge(self, queue): ...
        async def depth(self, queues=()): ...
        async def peek(self, queue, *, limit=100, offset=0): ...
        async def close(self): ...

    class FakeSerializer(Serializer):
        api_version = (1, 0)
        name = "fake"
        content_type = "application/x-fake"
        content_encoding = "binary"
        def dumps(self, value): return repr(value).encode()
        def loads(self, data): return eval(data)
"""
"""Source of well-made drivers, for fake distributions to offer or to spoil."""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Write a distribution: ``install("umbel-x", {"umbel.transports": {"x": "umbel_x:X"}}, {"umbel_x": "source"})``."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def write(
        name: str,
        entry_points: Mapping[str, Mapping[str, str]] | None = None,
        modules: Mapping[str, str] | None = None,
        *,
        version: str = "1.0",
        extras: Sequence[str] = (),
    ) -> None:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        groups = [
            "\n".join([f"[{group}]", *(f"{key} = {target}" for key, target in names.items())])
            for group, names in (entry_points or {}).items()
        ]
        (info / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
        for module, source in (modules or {}).items():
            path = site.joinpath(*module.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(source))
        importlib.invalidate_caches()
        loader.forget_installed()

    yield write
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
        if any(str(place).startswith(str(site)) for place in places):
            del sys.modules[name]
    loader.forget_installed()
