"""A fresh file for each test, and small helpers as fixtures."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from umbel.model import Delivery, Message
from umbel.ports.transport import Credit
from umbel_sqlite.options import Options, TransportOptions
from umbel_sqlite.result_store import SqliteResultStore
from umbel_sqlite.transport import SqliteTransport


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "q.sqlite3"


@pytest.fixture
def transport(file: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[SqliteTransport]]:
    """``async with transport(option=…) as t``: a transport on the test's file."""

    @contextlib.asynccontextmanager
    async def make(clock: Any = None, **options: Any) -> AsyncIterator[SqliteTransport]:
        made = SqliteTransport(f"sqlite:///{file}", options=TransportOptions(**options), clock=clock)
        try:
            yield made
        finally:
            await made.close()

    return make


@pytest.fixture
def store(file: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[SqliteResultStore]]:
    """``async with store(option=…) as s``: a result store on the test's file."""

    @contextlib.asynccontextmanager
    async def make(clock: Any = None, **options: Any) -> AsyncIterator[SqliteResultStore]:
        made = SqliteResultStore(f"sqlite:///{file}", options=Options(**options), clock=clock)
        try:
            yield made
        finally:
            await made.close()

    return make


@pytest.fixture
def take() -> Callable[..., Any]:
    """``await take(transport, "q", 3)``: exactly that many deliveries; fewer if an empty look comes first."""

    async def taken(
        t: SqliteTransport, queues: str | Sequence[str], number: int, lease: float = 30.0
    ) -> list[Delivery]:
        names = [queues] if isinstance(queues, str) else list(queues)
        credit = Credit(number)
        got: list[Delivery] = []
        stream = t.consume(names, credit=credit, lease=lease)
        try:
            async for batch in stream:
                got += batch
                assert len(got) <= number
                if len(got) == number or not batch:
                    return got
        finally:
            await stream.aclose()  # type: ignore[attr-defined]  # an async generator
        raise AssertionError("the stream ended")

    return taken


@pytest.fixture
def message() -> Callable[..., Message]:
    def made(id_: str = "1", queue: str = "q", **fields: Any) -> Message:
        headers = {"id": id_, "task": "t", **fields.pop("headers", {})}
        return Message(queue=queue, headers=headers, **fields)

    return made


@pytest.fixture
def process(file: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Run the body of an ``async def main(url)`` in another process; killed at the end if it still runs."""
    started: list[subprocess.Popen[str]] = []
    limits: list[threading.Timer] = []

    def start(body: str) -> subprocess.Popen[str]:
        script = (
            "import asyncio, json, os, signal, sys, time\n"
            "from umbel.model import Action, Message, Result, Settlement\n"
            "from umbel.ports.transport import Credit\n"
            "from umbel_sqlite.result_store import SqliteResultStore\n"
            "from umbel_sqlite.transport import SqliteTransport\n"
            "def say(value): print(json.dumps(value), flush=True)\n"
            "async def main(url):\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n"
            f"asyncio.run(main({f'sqlite:///{file}'!r}))\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(child)
        # Whoever waits for its words, perhaps in a thread that cannot be interrupted, waits no longer than this.
        limit = threading.Timer(60, child.kill)
        limit.daemon = True
        limit.start()
        limits.append(limit)
        return child

    yield start
    for child, limit in zip(started, limits, strict=True):
        limit.cancel()
        child.kill()
        child.communicate(timeout=30)
