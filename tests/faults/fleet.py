"""Workers before one broker, and what the ledger says of them."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import define, field
from brokers import Broker
from cluster import FULL, READY, Cluster, WorkerProcess, until
from servers.proxy import Proxy

from umbel import Umbel
from umbel.errors import BrokerUnavailable
from umbel.protocol import new_id
from umbel.result import AsyncResult

__all__ = ["FULL", "Fleet", "Sender", "descriptors", "ready", "rss"]


@define
class Fleet:
    """One application whose workers stand before ``broker``."""

    cluster: Cluster
    broker: Broker
    results: str

    def configure(self, **settings: Any) -> Fleet:
        self.cluster.configure(**{"broker__url": self.broker.url, "results__url": self.results, **settings})
        return self

    @property
    def app(self) -> Umbel:
        """The app of the test, which no proxy stands before."""
        return self.cluster.app

    def worker(self, *arguments: str, wait: bool = True, proxy: Proxy | None = None) -> WorkerProcess:
        env = {} if proxy is None else {"UMBEL_BROKER__URL": proxy.through(self.broker.url)}
        return self.cluster.worker(*arguments, wait=wait, env=env)

    def send_many(self, task: str, calls: Sequence[Sequence[Any]], **options: Any) -> list[AsyncResult[Any]]:
        return self.cluster.send_many(task, calls, **options)

    def wait_done(self, *, timeout: float) -> None:
        """Until the broker has nothing left."""
        until(lambda: self.broker.left() == 0, "the broker has nothing left", timeout=timeout, every=0.1)

    def check_ledger(self, sent: Sequence[str], *, perhaps: Sequence[str] = ()) -> int:
        """Whether all that was ``sent`` has ended, with success, and nothing else but some of ``perhaps``; no dead letters.

        Returns how often a task was started again.
        """
        starts = Counter(line["id"] for line in self.cluster.ledger.starts())
        ended = {line["id"] for line in self.cluster.ledger.ends()}
        assert len(set(sent) - ended) == 0, f"{len(set(sent) - ended)} of {len(sent)} lost"
        assert ended <= {*sent, *perhaps}
        records = self.app.gateway.get(sent)
        assert records.keys() == set(sent)
        assert {record.state for record in records.values()} == {"SUCCESS"}
        assert self.cluster.dead() == []
        return starts.total() - len(starts)


def ready(worker: WorkerProcess) -> bool:
    return READY in worker.text


def rss(worker: WorkerProcess) -> float:
    """MiB that the worker itself, without its children, has in memory."""
    pages = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors(worker: WorkerProcess) -> int:
    """Files and sockets that the worker itself has open."""
    return len(os.listdir(f"/proc/{worker.pid}/fd"))


@define
class Sender:
    """Calls ``delay()`` again and again in a thread of its own, whatever comes of it."""

    app: Umbel
    accepted: list[str] = field(factory=list)
    refused: list[str] = field(factory=list)
    """Ids of calls that raised: nobody knows whether they arrived."""
    longest: float = 0.0
    """Seconds that the longest call took."""
    wrong: list[BaseException] = field(factory=list)
    """What was raised and should not have been."""
    _over: threading.Event = field(factory=threading.Event)
    _thread: threading.Thread | None = None

    def _send(self) -> None:
        note = self.app.tasks["shop.note"]
        while not self._over.wait(0.004):
            task_id, began = new_id(), time.monotonic()
            try:
                note.apply_async((len(self.accepted), 0.001), task_id=task_id)
                self.accepted.append(task_id)
            except BrokerUnavailable:
                self.refused.append(task_id)
            except BaseException as error:
                self.wrong.append(error)
                raise
            self.longest = max(self.longest, time.monotonic() - began)

    def __enter__(self) -> Sender:
        self._thread = threading.Thread(target=self._send, name="sender")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(60)
