"""Workers that are killed at random between a broker and a store that are cut off at random, and what they wrote down."""

from __future__ import annotations

import fcntl
import json
import os
import random
import sqlite3
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from attrs import define, field
from canvas_model import Calls, Case, Failed, Tree, canvas_of, expected, table_canvas, table_fails, table_told
from canvas_work import Misbehaving
from cluster import FULL, READY, Cluster, WorkerProcess, until
from servers.proxy import Proxy
from servers.redis import RedisServer

from umbel import Umbel, group
from umbel.canvas import joining
from umbel.canvas.graph import join_key, plan_id
from umbel.canvas.sending import read_shown
from umbel.errors import UmbelError
from umbel.model import FINAL_STATES, Result, State

_HERE: Final = Path(__file__).parent
PAIRS: Final = [(broker, store) for store in ("sqlite", "redis") for broker in ("sqlite", "redis", "amqp")]
_URLS: Final = {"redis": "redis_url", "amqp": "rabbitmq_url"}
KEPT: Final = 900.0
"""Seconds for which results and workflows are kept."""
LEASE: Final = None if FULL else 4.0
"""Of the right to fire and of a start; None: what users have. It has to outlast every stall of a worker that lives."""
_STORED: Final = "canvases:"
"""What stands before the keys of the store, which may lie beside the broker's."""
_FENCES: Final = b":fence"
"""What the keys of fencing numbers end with: one for each shard, which may never begin anew."""

Line = Mapping[str, Any]


@pytest.fixture
def fleet(cluster: Cluster, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Not yet running: between a broker and a store as ``request.param`` names them."""
    broker, store = request.param
    urls = {kind: request.getfixturevalue(_URLS[kind]) for kind in {broker, store} & _URLS.keys()}
    with fleet_between(cluster, monkeypatch, urls.get(broker), urls.get(store)) as made:
        if broker == "amqp":
            made.held = partial(request.getfixturevalue("rabbitmq").messages, urls[broker])
        if store == "redis":
            made.redis = request.getfixturevalue("redis_server")
            made.proxy = request.getfixturevalue("make_proxy")(made.redis.port)
            made.environment["UMBEL_RESULTS__URL"] = made.proxy.through(made.app.settings.results.url)
        yield made


@contextmanager
def fleet_between(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, broker: str | None, store: str | None
) -> Iterator[Fleet]:
    """A fleet between the servers at those addresses; None: a file."""
    monkeypatch.setenv("LEDGER", str(cluster.ledger.file))
    with shop_of(
        cluster,
        monkeypatch,
        broker__lease=2.0,
        worker__max_deliveries=30,
        results__expires=KEPT,
        workflows__expires=KEPT,
        **({} if broker is None else {"broker__url": broker}),
        **({} if store is None else {"results__url": f"{store}?prefix={_STORED}"}),
    ) as shop:
        yield Fleet(cluster, shop)


@contextmanager
def shop_of(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Any]:
    """The tasks of the cluster's workers, in this process, for sending."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(_HERE), os.environ.get("PYTHONPATH", "")])))
    cluster.configure(app="canvas_shop", **settings)
    monkeypatch.delitem(sys.modules, "canvas_shop", raising=False)
    import canvas_shop

    app: Umbel = canvas_shop.app
    app.configure(file=cluster.folder / "umbel.toml")
    try:
        yield canvas_shop
    finally:
        app.close()
        del sys.modules["canvas_shop"]


@define(eq=False)
class Fleet:
    """One broker, one store, and workers with names of their own."""

    cluster: Cluster
    shop: Any
    redis: RedisServer | None = None
    """That the store is on; None: it is a file."""
    proxy: Proxy | None = None
    """Between the workers and the store."""
    held: Callable[[], int] | None = None
    """How many messages the broker has, those included that workers hold; None: `depth` tells."""
    kills: dict[str, tuple[float, float]] = field(factory=dict)
    """Between which moments a worker was killed, by its name."""
    environment: dict[str, str] = field(factory=dict)
    """Of every worker."""
    workers: dict[str, WorkerProcess] = field(factory=dict)
    """Those that were not killed, by their names."""
    _number: int = 0

    @property
    def app(self) -> Umbel:
        app: Umbel = self.shop.app
        return app

    def misbehave(self, *, copies: int, late: float, faults: float) -> None:
        """Every message comes ``copies`` times, up to ``late`` seconds apart; of the store's answers to workers some are lost."""
        self.app.plugins.register(Misbehaving(copies=copies, late=late))
        self.environment |= {"CANVAS_COPIES": str(copies), "CANVAS_LATE": str(late), "CANVAS_FAULTS": str(faults)}

    @property
    def leases(self) -> dict[str, str]:
        """In the environment of what is to have short leases."""
        return {} if LEASE is None else {"CANVAS_LEASE": str(LEASE)}

    # --- workers ---

    def worker(self, *, wait: bool = False, **environment: str) -> str:
        """Start one more; its name."""
        self._number += 1
        name = f"w{self._number}"
        env = {**self.leases, **self.environment, **environment}
        self.workers[name] = self.cluster.worker("-n", name, wait=wait, env=env)
        return name

    def kill(self, name: str) -> None:
        """SIGKILL to a worker and all its processes."""
        before = time.time()
        self.workers.pop(name).kill_all()
        self.kills[name] = (before, time.time())

    @contextmanager
    def killing(self, chance: random.Random, *, every: tuple[float, float], most: int = 10**9) -> Iterator[None]:
        """Meanwhile a worker is killed again and again, and another started in its place.

        Only while all are ready: else, on a busy machine, they would die faster than they start.
        """

        def kill() -> bool:
            ready = all(READY in worker.text for worker in self.workers.values())
            if ready:
                self.kill(chance.choice(sorted(self.workers)))
                self.worker()
            return ready

        with _meanwhile(kill, lambda: chance.uniform(*every), most):
            yield

    @contextmanager
    def cutting(self, chance: random.Random, *, every: tuple[float, float], most: int = 10**9) -> Iterator[None]:
        """Meanwhile the workers are cut off from their store again and again."""
        with ExitStack() as stack:
            if self.proxy is not None:
                proxy = self.proxy

                def cut() -> bool:
                    return proxy.reset() > 0

            else:
                lock = stack.enter_context((self.cluster.folder / "results.sqlite3-lock").open("ab"))

                def cut() -> bool:  # nobody writes, nor opens the file anew
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    time.sleep(chance.uniform(0.1, 0.5))
                    fcntl.flock(lock, fcntl.LOCK_UN)
                    return True

            stack.enter_context(_meanwhile(cut, lambda: chance.uniform(*every), most))
            yield

    # --- what came of it ---

    def lines(self, what: str) -> list[dict[str, Any]]:
        return self.cluster.ledger.lines(what)

    def records(self, names: Sequence[str]) -> Mapping[str, Result]:
        return self.app.gateway.get(list(names))

    def wait_until_over(self, workflows: Sequence[str], *, timeout: float) -> None:
        """Until each has come to a final state. Fails with all that is known of those that have not."""
        left = {plan_id(workflow): workflow for workflow in workflows}
        end = time.monotonic() + timeout
        while left:
            found = self.records(list(left))
            left = {name: workflow for name, workflow in left.items() if not (name in found and found[name].final)}
            if time.monotonic() > end:
                pytest.fail(
                    f"{len(left)} of {len(workflows)} workflows have not ended within {timeout:g} s, depth "
                    f"{self.depth()}:\n" + "\n".join(map(self.standing, [*left.values()][:5]))
                )
            time.sleep(0.1)

    def wait_until_idle(self, *, timeout: float) -> None:
        """Until the last late copy has been consumed."""

        def idle() -> bool:
            return self.depth() == (0, 0, 0) and (self.held is None or self.held() == 0)

        until(idle, "every copy is consumed", timeout=timeout, every=0.1)

    def depth(self) -> tuple[int, int, int]:
        gateway: Any = self.app.gateway
        found = gateway.runtime.call(gateway.transport.depth(["default"]))["default"]
        return found.ready, found.delayed, found.leased

    def standing(self, workflow: str) -> str:
        """Which of a workflow's joins wait, for people who look for a fault."""
        record = self.records([plan_id(workflow)]).get(plan_id(workflow))
        if record is None:
            return f"{workflow}: no record"
        waits = []
        for name in read_shown(self.app, record)[1]:
            key = join_key(workflow, name)
            state = joining.join(self.app.gateway, [joining.Marked(key, {}, None, "onlooker", KEPT)])[0]
            marked = sorted(map(int, joining.members(self.app.gateway, key)))
            waits.append(f"{name}: {state.count}/{state.size} {marked}{' fires' if state.fires else ''}")
        return f"{workflow}: {'; '.join(waits)}"

    def check_starts(self, starts: Mapping[Any, Sequence[Line]]) -> None:
        """Of what has a claim, or one id: it is started again only where the worker that ran it was killed meanwhile."""
        for key, lines in starts.items():
            lines = sorted(lines, key=lambda line: line["at"])
            for one, again in pairwise(lines):
                before, after = self.kills.get(one["worker"], (0.0, 0.0))
                was_killed = one["at"] <= after and before <= again["at"]
                assert was_killed, (
                    f"{key} started in {one['worker']} and again in {again['worker']}, {again['at'] - one['at']:.3f} s later, "
                    f"and nobody had killed the first: {one} {again}"
                )

    def check_nothing_is_kept_for_ever(self) -> None:
        """Every key of the store is forgotten by itself when its time is over."""
        if self.redis is not None:
            database = int(self.app.settings.results.url.partition("?")[0].rpartition("/")[2])
            keys = self.redis.command("KEYS", f"{_STORED}*", database=database)
            left = {key: self.redis.command("PTTL", key, database=database) for key in keys}
            assert left
            for_ever = {key for key, ms in left.items() if not (ms == -2 or 0 <= ms <= KEPT * 1000)}
            assert not {key for key in for_ever if not key.endswith(_FENCES)}
            return
        with closing(sqlite3.connect(self.cluster.folder / "results.sqlite3")) as db:
            late = time.time() + KEPT + 5
            for table, moment in (("results", "expires"), ("joins", "expires"), ("claims", "until")):
                wrong = f"{moment} IS NULL OR {moment} > {late}"
                assert db.execute(f"SELECT * FROM umbel_{table} WHERE {wrong}").fetchall() == []
                assert db.execute(f"SELECT count(*) FROM umbel_{table}").fetchone()[0] > 0
            orphans = "SELECT key FROM umbel_marks WHERE key NOT IN (SELECT key FROM umbel_joins)"
            assert db.execute(orphans).fetchall() == []


@contextmanager
def _meanwhile(act: Callable[[], bool], pause: Callable[[], float], most: int = 10**9) -> Iterator[None]:
    """``act`` again and again, until it has done so ``most`` times: True says that it has."""
    over, failed = threading.Event(), []

    def run() -> None:
        done = 0
        try:
            while done < most and not over.wait(pause()):
                done += act()
        except BaseException as exc:  # shown where the test waits for the thread
            failed.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(60)
    assert not failed, failed
    assert not thread.is_alive()


# --- generated canvases and the truth table, sent to a fleet ----------------------------------------


@define(eq=False)
class Sent:
    """Canvases and cases that were sent to a fleet, and what must have come of them."""

    fleet: Fleet
    canvases: dict[int, tuple[Tree, Any]] = field(factory=dict)
    cases: dict[int, tuple[Case, Any]] = field(factory=dict)

    def send(self, trees: Sequence[Tree], cases: Sequence[Case] = ()) -> None:
        shop = self.fleet.shop
        for number, tree in enumerate(trees, len(self.canvases)):

            def call(kind: str, label: int, canvas: int = number) -> Any:
                return shop.work.s(kind=kind, label=label, canvas=canvas)

            handle = (group([canvas_of(tree, call)]) | shop.identity.s()).apply_async()
            self.canvases[number] = tree, handle
        for number, case in enumerate(cases, len(self.cases)):

            def tell(what: str, number: int = number) -> Any:
                return shop.note.si(number, what)

            self.cases[number] = case, table_canvas(case, tell, shop).apply_async((1,))

    def wait(self, *, timeout: float) -> None:
        """Until all have ended. Fails with what is known of those that have not."""
        workflows = [handle.workflow for _, handle in (*self.canvases.values(), *self.cases.values())]
        self.fleet.wait_until_over(workflows, timeout=timeout)

    def check(self) -> dict[str, int]:
        """Compare what happened with what had to; figures of it. When everything is over, late copies included."""
        starts: dict[int, list[Line]] = defaultdict(list)
        for line in self.fleet.lines("work"):
            starts[line["value"][0]].append(line)
        for number, (tree, handle) in self.canvases.items():
            self._check_canvas(tree, handle, starts[number])
        told: dict[int, list[Line]] = defaultdict(list)
        for line in self.fleet.lines("note"):
            told[line["value"][0]].append(line)
        for number, (case, handle) in self.cases.items():
            self._check_case(case, handle, told[number])
        self.fleet.check_starts(_by_firing([line for lines in starts.values() for line in lines if line["value"][4]]))
        bodies = [line for lines in starts.values() for line in lines if line["value"][4]]
        return {
            "canvases": len(self.canvases),
            "cases": len(self.cases),
            "starts": sum(map(len, starts.values())),
            "bodies": len(_by_firing(bodies)),
            "bodies again after a kill": len(bodies) - len(_by_firing(bodies)),
            "kills": len(self.fleet.kills),
        }

    def _check_canvas(self, tree: Tree, handle: Any, lines: Sequence[Line]) -> None:
        calls: Calls = {}
        try:
            value: Any = expected(("group", [tree]), calls=calls)
        except Failed:
            value = Failed
        try:
            came: Any = handle.get(timeout=30)
        except (UmbelError, ValueError):
            came = Failed
        assert came == value, tree
        given: dict[int, list[Any]] = defaultdict(list)
        for line in lines:
            _, label, what, _, _ = line["value"]
            given[label].append(what)
        assert given.keys() == calls.keys(), f"what started is not what had to: {tree}"
        wrong = {label: found for label, found in given.items() if any(what != calls[label] for what in found)}
        assert not wrong, f"inputs are not as declared: {wrong} {tree}"
        ids: dict[tuple[int, bool], set[str]] = defaultdict(set)
        for line in lines:
            ids[line["value"][1], line["value"][4]].add(line["id"])
        assert all(len(found) == 1 for found in ids.values()), f"a task ran under several ids: {ids} {tree}"

    def _check_case(self, case: Case, handle: Any, lines: Sequence[Line]) -> None:
        by_what: dict[str, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
        for line in lines:
            by_what[line["value"][1]][line["id"]].append(line)
        members = by_what.pop("member", {})
        assert {what: len(ids) for what, ids in by_what.items()} == table_told(case), case
        assert len(members) >= case[2], case
        for what, ids in by_what.items():
            self.fleet.check_starts({(case, what, id): starts for id, starts in ids.items()})
        state = self.fleet.records([handle.id])[handle.id].state
        assert state in FINAL_STATES, case
        assert (state != State.SUCCESS) == table_fails(case), case


def _by_firing(lines: Sequence[Line]) -> dict[Any, list[Line]]:
    """Starts of what joins have started, by what tells one attempt from another."""
    found: dict[Any, list[Line]] = defaultdict(list)
    for line in lines:
        found[line["id"], line["retries"], line["value"][3]].append(line)
    return found


def shown(figures: Mapping[str, Any]) -> str:
    return json.dumps(figures)
