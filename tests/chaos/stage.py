"""A fleet under disasters: workers that are started again whenever they end, and all that is written down about them."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from attrs import define, field
from brokers import Broker, RabbitBroker, RedisBroker
from cluster import Cluster, WorkerProcess
from disasters import Disaster
from fleet import Fleet, ready
from load import Call
from servers.process import Server
from servers.proxy import Proxy
from servers.rabbitmq import RabbitServer
from servers.redis import RedisServer
from verdict import Evidence, Sent, Struck

from umbel.errors import PublishError

WORKERS = 2
STARTING = 60.0
_AT_ONCE = 50
"""Messages of one publish."""
HEARTBEAT = 3.0
"""Seconds after which RabbitMQ believes a silent worker dead. A busy machine misses one of 1 s: a fault that nobody has done,
and that explains no second start."""


class SqliteBroker(Broker):
    """A file: no server that could be killed, and no network."""

    name: ClassVar[str] = "sqlite"
    patient: ClassVar[Mapping[str, Any]] = {"broker__lease": 2.0}
    hasty: ClassVar[Mapping[str, Any]] = {"broker__lease": 2.0}
    resumes: ClassVar[float] = 30.0

    def __init__(self, file: Path) -> None:
        self.file = file
        self.url = f"sqlite:///{file}"

    @property
    def server(self) -> Server:
        raise LookupError("a file has no server")

    def left(self) -> int:
        with closing(sqlite3.connect(self.file, timeout=30)) as db:
            ((number,),) = db.execute("SELECT count(*) FROM umbel_messages WHERE queue NOT LIKE '%.dead'")
        return int(number)

    def consumers(self) -> int:
        raise LookupError("a file has no consumers")

    def subscribers(self) -> int:
        raise LookupError("a file has no subscribers")

    def connections(self) -> int:
        raise LookupError("a file has no connections")

    def kill(self) -> None:
        raise LookupError("a file cannot be killed")


@define
class Keeper:
    """Sees to it that one worker runs, always under the same name, as a service manager does."""

    name: str
    clock: Path
    start: Callable[[], WorkerProcess]
    worker: WorkerProcess = field(init=False)
    starts: int = 0

    def __attrs_post_init__(self) -> None:
        self.tend()

    def tend(self) -> None:
        if not self.starts or not self.worker.running:
            self.worker = self.start()
            self.starts += 1

    @property
    def ready(self) -> bool:
        return self.worker.running and ready(self.worker)

    @property
    def children(self) -> Sequence[int]:
        return self.worker.children if self.worker.running else ()


class Watch:
    """Notices when the machine stood still: a thread that was to run at once ran much later. So may have done every worker."""

    def __init__(self, longest: float, lingers: float) -> None:
        """A gap of more than ``longest`` seconds counts, and may show itself for ``lingers`` seconds more."""
        self.struck: list[Struck] = []
        self._longest, self._lingers = longest, lingers
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch")

    def _look(self) -> None:
        before = time.time()
        while not self._over.wait(0.05):
            now = time.time()
            if now - before > self._longest:
                still = Struck(kind="the machine stood still", began=before, ended=now + self._lingers, workers=None)
                self.struck.append(still)
            before = now

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


@define
class Stage:
    """One application, its broker, its result store, its workers."""

    fleet: Fleet
    results: RedisServer
    through: Proxy | None
    lease: float
    watch: Watch
    step: float
    """Seconds by which clocks step back. So much later comes what a worker gives back meanwhile for want of its time."""
    keepers: list[Keeper] = field(factory=list)
    sent: list[Sent] = field(factory=list)
    perhaps: set[str] = field(factory=set)
    struck: list[Struck] = field(factory=list)

    @property
    def proxy(self) -> Proxy:
        assert self.through is not None, "no network stands before this broker"
        return self.through

    @property
    def rabbit(self) -> RabbitServer:
        server = self.fleet.broker.server
        assert isinstance(server, RabbitServer)
        return server

    @property
    def file(self) -> Path:
        assert isinstance(self.fleet.broker, SqliteBroker)
        return self.fleet.broker.file

    # --- the play ---

    def raise_curtain(self) -> None:
        """Start the workers, and wait until they are ready."""
        cluster = self.fleet.cluster
        for number in range(1, WORKERS + 1):
            name, clock = f"w{number}", cluster.folder / f"clock-{number}"
            clock.write_text("0")
            env = {"SHOP_CLOCK": str(clock)}
            if self.through is not None:
                env["UMBEL_BROKER__URL"] = self.through.through(self.fleet.broker.url)

            def start(name: str = name, env: Mapping[str, str] = env) -> WorkerProcess:
                return cluster.worker("--name", name, wait=False, env=env)

            self.keepers.append(Keeper(name, clock, start))
        self.wait_ready()

    def wait_ready(self) -> None:
        """Until every worker that was started is ready, and started again if it has ended."""
        end = time.monotonic() + STARTING
        while not all(keeper.ready for keeper in self.keepers):
            assert time.monotonic() < end, "a worker does not become ready"
            for keeper in self.keepers:
                keeper.tend()
            time.sleep(0.02)

    def send(self, calls: Sequence[Call]) -> None:
        """Send; what raises may have arrived or not."""
        for start in range(0, len(calls), _AT_ONCE):
            part = calls[start : start + _AT_ONCE]
            messages = [self.fleet.app.tasks[f"shop.{c.task}"].message(c.args, **c.options) for c in part]  # type: ignore[arg-type]  # of CallOptions
            began = time.time()
            try:
                self.fleet.app.client.send(messages, 5.0)
                self.sent += [call.sent(message.id, began) for call, message in zip(part, messages, strict=True)]
            except PublishError:
                self.perhaps.update(message.id for message in messages)

    def perform(self, calls: Sequence[Call], disasters: Sequence[Disaster], chance: random.Random) -> None:
        """Half of the load first, the rest between the disasters."""
        half = len(calls) // 2
        self.send(calls[:half])
        rest = list(calls[half:])
        share = -(-len(rest) // max(1, len(disasters)))
        for disaster in disasters:
            self.send(rest[:share])
            del rest[:share]
            self.wait_ready()
            time.sleep(chance.uniform(0.1, 0.5))
            self.struck.append(disaster(self, chance))

    def let_it_end(self, timeout: float) -> None:
        """Until the broker has nothing left and every record is there, or ``timeout`` seconds have passed."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for keeper in self.keepers:
                keeper.tend()
            if self.fleet.broker.left() == 0 and not self._missing():
                return
            time.sleep(0.1)

    def _missing(self) -> bool:
        states = self._states()
        return any(states.get(one.id) not in ("SUCCESS", "FAILURE", "REVOKED") for one in self.sent if not one.once)

    def _states(self) -> dict[str, str]:
        found: dict[str, str] = {}
        ids = [one.id for one in self.sent]
        for start in range(0, len(ids), 1000):
            records = self.fleet.app.gateway.get(ids[start : start + 1000])
            found |= {task_id: record.state for task_id, record in records.items()}
        return found

    def evidence(self) -> Evidence:
        return Evidence(
            sent=self.sent,
            lines=self.fleet.cluster.ledger.lines(),
            states=self._states(),
            faults=[*self.struck, *self.watch.struck],
            left=self.fleet.broker.left(),
            dead=len(self.fleet.cluster.dead()),
            perhaps=frozenset(self.perhaps),
        )


@contextmanager
def staged(folder: Path, broker: str, rabbit: RabbitServer | None = None, *, step: float = 90.0) -> Iterator[Stage]:
    """Servers and an application of their own in ``folder``, without workers; everything is ended afterwards."""
    with ExitStack() as stack:
        results = stack.enter_context(RedisServer(folder / "results"))
        made: Broker
        if broker == "sqlite":
            made = SqliteBroker(folder / "broker.sqlite3")
        elif broker == "redis":
            made = RedisBroker(stack.enter_context(RedisServer(folder / "broker")))
        else:
            if rabbit is None:
                rabbit = stack.enter_context(RabbitServer(folder / "rabbit"))
            made = RabbitBroker(rabbit)
        proxy = None if broker == "sqlite" else stack.enter_context(Proxy(made.server.port))
        cluster = Cluster(folder)
        stack.callback(cluster.close)
        fleet = Fleet(cluster, made, results.url)
        settings = {**made.hasty, "worker__max_deliveries": 50, "worker__grace": 5, "broker__publish_timeout": 5.0}
        if isinstance(made, RabbitBroker):
            settings["broker__options__heartbeat"] = HEARTBEAT
        fleet.configure(**settings)
        lease = float(settings.get("broker__lease", HEARTBEAT))
        watch = stack.enter_context(Watch(lease / 3, lease))
        yield Stage(fleet, results, proxy, lease, watch, step)
