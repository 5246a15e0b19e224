"""Ten thousand who wait at once, in one process, on two connections; and records that go when their time is over."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cluster import until

from umbel import Umbel
from umbel.model import Result

WAITERS = 10_000


def ended(app: Umbel, task_ids: list[str]) -> list[Result]:
    documents = {i: app.result_codec.encode({"status": "SUCCESS", "result": n}) for n, i in enumerate(task_ids)}
    return [Result(task_id=i, state="SUCCESS", document=e.body, expires=3600.0) for i, e in documents.items()]


async def wait_for_all(app: Umbel, other: Umbel, look: Callable[[], None]) -> None:
    task_ids = [f"task-{n}" for n in range(WAITERS)]
    waiting = [asyncio.ensure_future(app.result(task_id).aget(timeout=100)) for task_id in task_ids]
    await asyncio.sleep(1.0)
    look()
    assert not any(task.done() for task in waiting)
    results = ended(other, task_ids)
    for at in range(0, WAITERS, 1000):
        await other.gateway.aput(results[at : at + 1000])
    assert await asyncio.gather(*waiting) == list(range(WAITERS))
    look()


def test_ten_thousand_wait_on_two_connections_to_redis(make_redis: Callable[..., Any]) -> None:
    server = make_redis()
    url = server.url_of(0)
    counted: list[int] = []
    with (
        Umbel("waits", broker="memory://waits", results=url) as app,
        Umbel("tells", broker="memory://waits", results=url) as other,
    ):
        other.gateway.get(["nobody"])  # type: ignore[attr-defined]  # it has its one connection from here on

        def clients() -> int:
            return len([line for line in server.command("CLIENT", "LIST").splitlines() if line])

        before = clients()

        def look() -> None:
            counted.append(clients() - before)

        asyncio.run(wait_for_all(app, other, look))
    assert counted[0] == 2, "one on which results are heard, one on which they are looked up"
    assert counted[1] <= 2, "no more were needed to get them all"


def test_ten_thousand_wait_on_one_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/results.db"
    opened: list[int] = []
    with (
        Umbel("waits", broker="memory://waits", results=url) as app,
        Umbel("tells", broker="memory://waits", results=url) as other,
    ):

        def look() -> None:
            files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _links(fd)]
            opened.append(sum(1 for file in files if file.endswith("results.db")))

        asyncio.run(wait_for_all(app, other, look))
    # One each; on a machine that is busy, one more while a connection is made anew.
    assert max(opened) <= 4, f"both apps together have it open so often: {opened}"


def _links(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("store", ["sqlite", "redis", "memory"])
def test_records_are_swept_when_their_time_is_over(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = {"sqlite": f"sqlite:///{tmp_path}/results.db", "memory": "memory://swept"}.get(store)
    url = url or request.getfixturevalue("redis_url")
    with Umbel("sweeps", broker="memory://swept", results=url) as app:
        results = ended(app, [f"task-{n}" for n in range(500)])
        short = [Result(task_id=r.task_id, state=r.state, document=r.document, expires=2.0) for r in results]
        app.gateway.put(short)
        assert len(app.gateway.get([r.task_id for r in short])) == 500
        until(lambda: not app.gateway.get([r.task_id for r in short]), "they are over", every=0.2)

        def kept() -> int:
            app.gateway.put(ended(app, ["one more"]))  # a write sweeps, where the store has to
            if store == "sqlite":
                with closing(sqlite3.connect(tmp_path / "results.db")) as db:
                    return int(db.execute("SELECT count(*) FROM umbel_results").fetchone()[0])
            if store == "memory":
                return len(app.gateway.store._memory.records._values)  # type: ignore[attr-defined]  # what it holds
            server = request.getfixturevalue("redis_server")
            database = int(url.rpartition("/")[2])
            return len(server.command("KEYS", "*task-meta*", database=database))

        until(lambda: kept() == 1, "the store holds nothing but what has been put since", timeout=30, every=0.5)
