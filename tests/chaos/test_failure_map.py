"""The map of failures is complete, and the classes that no other folder tests are tested here."""

from __future__ import annotations

import re
import signal
import sqlite3
import time
import tomllib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, until
from servers.redis import RedisServer

from umbel.errors import TaskRevoked
from umbel.plugins import kinds
from umbel.plugins.kinds import Kind
from umbel_sqlite.messages import CLAIMABLE

ROOT = Path(__file__).parents[2]
MAP = ROOT / "docs/explanation/failure-map.md"
ROW = re.compile(r"^\| F(\d+) \|.*\| (`.*`) \|$", re.MULTILINE)
KINDS = [kind for kind in kinds.KINDS if kind.port]


def test_every_class_of_failure_has_its_tests() -> None:
    rows = {int(number): re.findall(r"`([^`]+)`", tests) for number, tests in ROW.findall(MAP.read_text())}
    assert sorted(rows) == list(range(1, 21))
    for number, tests in rows.items():
        for named in tests:
            file, _, test = named.partition("::")
            assert (ROOT / file).is_file(), f"F{number}: there is no {file}"
            assert f"def {test}(" in (ROOT / file).read_text() or not test, f"F{number}: there is no {named}"


def test_every_class_of_failure_has_a_test_that_bears_its_number() -> None:
    for number, tests in ROW.findall(MAP.read_text()):
        assert re.search(rf"::test_(f\d\d_)*f{int(number):02}_", tests), f"F{number}: {tests}"


def test_every_test_that_names_a_class_is_on_the_map() -> None:
    told = MAP.read_text()
    for file in [*ROOT.glob("tests/*/test_*.py"), *ROOT.glob("plugins/*/tests/test_*.py")]:
        for name in re.findall(r"^def (test_f\d\d_\w+)\(", file.read_text(), re.MULTILINE):
            for number in re.findall(r"f(\d\d)_", name):
                assert re.search(rf"^\| F{int(number)} \|", told, re.MULTILINE), name


def test_f06_a_worker_that_comes_back_under_its_name_neither_keeps_nor_repeats_what_its_former_self_runs(
    cluster: Cluster,
) -> None:
    """As pods of a set do: first while the former one drains, then after it was killed."""
    cluster.configure(broker__lease=3.0, worker__concurrency=1, worker__grace=90)
    former = cluster.worker("--name", "pod-0")
    gate = cluster.folder / "gate"
    drained = cluster.send("gated", str(gate))
    cluster.ledger.wait_start(drained.id)
    former.tell(signal.SIGTERM)
    second = cluster.worker("--name", "pod-0")
    assert cluster.send("note", 1).get(timeout=30) == 1
    time.sleep(4.5)  # a lease and a half
    gate.touch()
    assert former.wait(30) == 0
    assert drained.get(timeout=30) is None
    assert len(cluster.ledger.starts(drained.id)) == 1

    other = cluster.folder / "other"
    killed = cluster.send("gated", str(other))
    cluster.ledger.wait_start(killed.id, timeout=60)
    second.kill_all()
    cluster.worker("--name", "pod-0")
    assert cluster.ledger.wait_start(killed.id, number=2, timeout=60)["attempt"] == 2
    other.touch()
    assert killed.get(timeout=30) is None
    assert cluster.dead() == []


def test_f12_a_revocation_that_was_not_heard_is_found(cluster: Cluster) -> None:
    """A worker that hears no broadcast at all looks into the store before it starts anything, and again and again."""
    cluster.configure(worker__control=False)
    cluster.app.control.revoke(task="shop.note", headers={"tenant": "acme"})
    cluster.worker()
    refused = cluster.send("note", 1, headers={"tenant": "acme"})
    with pytest.raises(TaskRevoked):
        refused.get(timeout=30)
    running = cluster.send("polite")
    cluster.ledger.wait_start(running.id)
    running.cancel(grace=0)
    with pytest.raises(TaskRevoked):
        running.get(timeout=60)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_f17_every_driver_passes_the_suite_of_its_port(kind: Kind[Any]) -> None:
    """What one driver does not keep it does not declare: the suite looks at both, and no driver is without it."""
    suite = re.compile(rf"^class \w+\({kind.name.title().replace('_', '')}Contract\):", re.MULTILINE)
    drivers = 0
    for project in [*ROOT.glob("plugins/*/pyproject.toml"), *ROOT.glob("contrib/*/pyproject.toml")]:
        if offered := tomllib.loads(project.read_text())["project"].get("entry-points", {}).get(kind.group):
            drivers += len(offered)
            tests = [file.read_text() for file in project.parent.glob("tests/test_*.py")]
            assert any(suite.search(text) for text in tests), f"{project.parent.name} offers {sorted(offered)}"
    assert drivers


@pytest.mark.parametrize("broker", ["sqlite", "redis"])
def test_f14_what_is_done_leaves_nothing_behind(
    cluster: Cluster,
    make_redis: Callable[..., RedisServer],
    broker: str,
) -> None:
    """After twice as many tasks the broker keeps no more than after the first half."""
    server = make_redis() if broker == "redis" else None
    cluster.configure(**({} if server is None else {"broker__url": server.url}))
    cluster.worker()

    def kept() -> object:
        if server is None:
            with closing(sqlite3.connect(cluster.folder / "broker.sqlite3", timeout=30)) as db:
                return [db.execute(f"SELECT count(*) FROM {table}").fetchone() for table in ("umbel_messages",)]
        sizes = {}
        for key in server.command("KEYS", "*"):
            kind = server.command("TYPE", key)
            length = {b"stream": "XLEN", b"zset": "ZCARD", b"list": "LLEN", b"hash": "HLEN", b"set": "SCARD"}.get(kind)
            sizes[key] = server.command(length, key) if length else 1
        return {key: size for key, size in sizes.items() if b"broadcast" not in key}

    seen = []
    for _ in range(2):
        cluster.send_many("silent", [()] * 300)
        cluster.wait_empty()
        until(lambda: cluster.empty(), "settled")
        time.sleep(0.3)
        seen.append(kept())
    assert seen[0] == seen[1]


def test_f15_claiming_from_a_backlog_reads_no_more_than_it_takes(cluster: Cluster) -> None:
    """However much waits: the claim goes through the index of what is ready, and sorts no more than it takes."""
    cluster.send_many("silent", [()] * 500)
    with closing(sqlite3.connect(cluster.folder / "broker.sqlite3", timeout=30)) as db:
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {CLAIMABLE}", {"queues": '["default"]', "limit": 10})]
    messages = [line for line in plan if "umbel_messages" in line or re.search(r"\bm\b", line)]
    assert any("umbel_messages_ready" in line for line in messages), plan
    assert not [line for line in messages if line.startswith("SCAN")], plan
