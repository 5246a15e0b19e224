"""Faults that are done to a running fleet, each in a moment drawn from a seed. Each ends what it began before it returns."""

from __future__ import annotations

import random
import resource
import signal
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING

from cluster import parents, send, until
from servers.proxy import CLIENT, SERVER
from servers.redis import RedisServer
from verdict import Struck

if TYPE_CHECKING:
    from stage import Stage

Disaster = Callable[["Stage", random.Random], Struck]

_FULL_AT = 4096
"""Bytes beyond which nothing can be written while the disk is full."""


def _struck(
    kind: str,
    began: float,
    *,
    workers: frozenset[str] | None = frozenset(),
    pids: frozenset[int] = frozenset(),
    deafens: bool = False,
    lingers: float = 0.0,
) -> Struck:
    """It has just ended; what it broke may show itself for ``lingers`` seconds more."""
    return Struck(kind=kind, began=began, ended=time.time() + lingers, workers=workers, pids=pids, deafens=deafens)


def _kill(pids: Iterable[int]) -> None:
    """SIGKILL."""
    send(sorted(pids), signal.SIGKILL)
    _wait_gone(pids)


def _wait_gone(pids: Iterable[int]) -> None:
    """A process may start tasks until it is gone, also one that only loses its parent."""
    until(lambda: parents().keys().isdisjoint(pids), f"processes {sorted(pids)} are gone", timeout=60)


# --- processes ------------------------------------------------------------------------------------


def kill_a_child(stage: Stage, chance: random.Random) -> Struck:
    began = time.time()
    children = [pid for keeper in stage.keepers for pid in keeper.children]
    chosen = frozenset(chance.sample(children, min(1, len(children))))
    _kill(chosen)
    return _struck("kill a child", began, pids=chosen)


def kill_a_fork_server(stage: Stage, chance: random.Random) -> Struck:
    """All children of one worker go with it."""
    began, keeper = time.time(), chance.choice(stage.keepers)
    children = set(keeper.children)
    servers = [pid for pid in keeper.worker.family[1:] if pid not in children]
    _kill(servers[:1])
    _wait_gone(children)
    return _struck("kill a fork server", began, workers=frozenset([keeper.name]))


def kill_a_worker(stage: Stage, chance: random.Random) -> Struck:
    """Alone, or with all its processes at once. It comes back under its old name, while its former leases still hold."""
    began, keeper = time.time(), chance.choice(stage.keepers)
    children = keeper.children
    keeper.worker.kill() if chance.random() < 0.5 else keeper.worker.kill_all()
    _wait_gone(children)
    return _struck("kill a worker", began, workers=frozenset([keeper.name]))


def stop_a_worker(stage: Stage, chance: random.Random) -> Struck:
    """TERM, as a deployment does: nothing of it may ever be run again for that."""
    began, keeper = time.time(), chance.choice(stage.keepers)
    keeper.worker.tell(signal.SIGTERM)
    return _struck("stop a worker", began)


def freeze_a_child(stage: Stage, chance: random.Random) -> Struck:
    """Its worker renews its lease meanwhile."""
    began = time.time()
    children = [pid for keeper in stage.keepers for pid in keeper.children]
    chosen = chance.sample(children, min(1, len(children)))
    send(chosen, signal.SIGSTOP)
    time.sleep(chance.uniform(0.1, 1.0))
    send(chosen, signal.SIGCONT)
    return _struck("freeze a child", began)


def freeze_a_worker(stage: Stage, chance: random.Random) -> Struck:
    """For less than a lease, or for more: then others take over what it held.

    Its children go on with what they have, until it looks at its leases again, at a third of one, and sees what is lost.
    """
    began, keeper = time.time(), chance.choice(stage.keepers)
    stage.fleet.cluster.freeze(keeper.worker)
    time.sleep(chance.choice([0.3, stage.lease * 1.5]))
    keeper.worker.tell_all(signal.SIGCONT)
    return _struck("freeze a worker", began, workers=frozenset([keeper.name]), lingers=stage.lease)


# --- the machine ----------------------------------------------------------------------------------


def step_the_clock_back(stage: Stage, chance: random.Random) -> Struck:
    """By 90 s, of one worker or of all, and forward again: leases that they gave meanwhile look as if they had ended.

    Those of a claim that was under way are put right when they are next renewed, at a third of one.
    """
    began = time.time()
    stepped = stage.keepers if chance.random() < 0.5 else [chance.choice(stage.keepers)]
    for keeper in stepped:
        keeper.clock.write_text(f"-{stage.step:g}")
    time.sleep(chance.uniform(0.5, 1.0))
    for keeper in stepped:
        keeper.clock.write_text("0")
    return _struck("step the clock back", began, workers=None, lingers=stage.lease)


def fill_the_disk(stage: Stage, chance: random.Random) -> Struck:
    """SQLite: no worker can write. Redis: it has no memory left. RabbitMQ: it sees too little room on its disk."""
    began, seconds = time.time(), chance.uniform(0.3, 1.0)
    match stage.fleet.broker.name:
        case "sqlite":
            pids = [keeper.worker.pid for keeper in stage.keepers if keeper.worker.running]
            limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
            for pid, (_, hard) in limits.items():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (_FULL_AT, hard))
            time.sleep(seconds)
            for pid, limit in limits.items():
                try:
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
                except ProcessLookupError:
                    pass  # ended meanwhile
        case "redis":
            server = stage.fleet.broker.server
            assert isinstance(server, RedisServer)
            server.command("CONFIG", "SET", "maxmemory", "1")
            time.sleep(seconds)
            server.command("CONFIG", "SET", "maxmemory", "0")
        case _:
            stage.rabbit.eval("rabbit_disk_monitor:set_disk_free_limit(1000000000000000)")
            time.sleep(seconds)
            stage.rabbit.eval("rabbit_disk_monitor:set_disk_free_limit(1000)")
    # A worker that cannot write renews no lease, and what it has done it can tell nobody.
    return _struck("fill the disk", began, workers=None)


def slow_the_disk_down(stage: Stage, chance: random.Random) -> Struck:
    """As far as that goes without being root: what keeps the messages answers in fits and starts.

    SQLite: another process holds its lock again and again. A server: is stopped again and again.
    """
    began = time.time()
    for _ in range(chance.randint(3, 6)):
        if stage.fleet.broker.name == "sqlite":
            with closing(sqlite3.connect(stage.file, timeout=30, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                time.sleep(chance.uniform(0.05, 0.25))
                other.execute("ROLLBACK")
        else:
            stage.fleet.broker.server.pause()
            time.sleep(chance.uniform(0.05, 0.25))
            stage.fleet.broker.server.resume()
        time.sleep(0.02)
    return _struck("slow the disk down", began)


# --- the network and the servers ------------------------------------------------------------------


def reset_connections(stage: Stage, chance: random.Random) -> Struck:
    began = time.time()
    stage.proxy.reset()
    return _struck("reset connections", began, workers=None, deafens=stage.fleet.broker.name == "rabbitmq")


def black_hole(stage: Stage, chance: random.Random) -> Struck:
    """Bytes vanish in one direction, or in both."""
    began = time.time()
    stage.proxy.stall(*chance.choice([(CLIENT,), (SERVER,), (CLIENT, SERVER)]))
    time.sleep(chance.uniform(0.3, 2.0))
    stage.proxy.heal()
    return _struck("black hole", began, workers=None, deafens=stage.fleet.broker.name == "rabbitmq")


def half_open(stage: Stage, chance: random.Random) -> Struck:
    began = time.time()
    stage.proxy.half_open(chance.choice([CLIENT, SERVER]))
    return _struck("half open", began, workers=None, deafens=stage.fleet.broker.name == "rabbitmq")


def cut_mid_frame(stage: Stage, chance: random.Random) -> Struck:
    began = time.time()
    stage.proxy.cut(chance.randint(1, 400), chance.choice([CLIENT, SERVER])).wait(1.0)
    return _struck("cut mid frame", began, workers=None, deafens=stage.fleet.broker.name == "rabbitmq")


def kill_the_broker(stage: Stage, chance: random.Random) -> Struck:
    began = time.time()
    stage.fleet.broker.kill()
    time.sleep(chance.uniform(0.0, 0.5))
    stage.fleet.broker.server.start()
    return _struck("kill the broker", began, workers=None, deafens=stage.fleet.broker.name == "rabbitmq")


def pause_the_broker(stage: Stage, chance: random.Random) -> Struck:
    began = time.time()
    stage.fleet.broker.server.pause()
    time.sleep(chance.uniform(0.3, 2.0))
    stage.fleet.broker.server.resume()
    return _struck("pause the broker", began, workers=None)


def kill_the_result_store(stage: Stage, chance: random.Random) -> Struck:
    """What has ended is kept and told later. Nothing is run again for that."""
    began = time.time()
    stage.results.kill()
    time.sleep(chance.uniform(0.1, 1.0))
    stage.results.start()
    return _struck("kill the result store", began)


def pause_the_result_store(stage: Stage, chance: random.Random) -> Struck:
    began = time.time()
    stage.results.pause()
    time.sleep(chance.uniform(0.1, 1.5))
    stage.results.resume()
    return _struck("pause the result store", began)


EVERYWHERE: tuple[Disaster, ...] = (
    kill_a_child,
    kill_a_fork_server,
    kill_a_worker,
    stop_a_worker,
    freeze_a_child,
    freeze_a_worker,
    step_the_clock_back,
    fill_the_disk,
    slow_the_disk_down,
    kill_the_result_store,
    pause_the_result_store,
)
TO_SERVERS: tuple[Disaster, ...] = (
    reset_connections,
    black_hole,
    half_open,
    cut_mid_frame,
    kill_the_broker,
    pause_the_broker,
)
DISASTERS: Mapping[str, tuple[Disaster, ...]] = {
    "sqlite": EVERYWHERE,
    "redis": EVERYWHERE + TO_SERVERS,
    "rabbitmq": EVERYWHERE + TO_SERVERS,
}
"""What can be done, by broker."""
