"""An app in memory whose tasks note their starts, and whose worker schedules."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from cluster import until

from umbel import Umbel, hookimpl
from umbel.errors import BrokerUnavailable
from umbel.gateway import LocalGateway
from umbel.model import Message, ScheduleEntry
from umbel.ports.scheduler import Scheduler
from umbel.ports.transport import QueueDepth, Transport
from umbel.scheduling.runs import HEADER_SCHEDULE


class Site:
    """An app in memory whose tasks note their starts."""

    def __init__(self, url: str, settings: Mapping[str, Any], plugins: Sequence[object] = ()) -> None:
        chosen = {
            "worker.pool": "threads",
            "worker.concurrency": 4,
            "worker.grace": 2,
            "worker.with_scheduler": True,
            "scheduler.lease": 1,
            "scheduler.poll": 0.1,
        }
        chosen = {**chosen, "results.url": url, **settings}
        self.app = Umbel("s", broker=url, settings=chosen, plugins=[*plugins, self])
        self.starts: list[tuple[str, str, float]] = []
        """What, id, when."""
        self.ready = threading.Event()
        self.gate = threading.Event()

        @self.app.task(name="note", bind=True)
        def note(task: Any, what: str = "") -> None:
            self.starts.append((what, task.request.id, time.time()))

        @self.app.task(name="slow", bind=True)
        def slow(task: Any) -> None:
            self.starts.append(("slow", task.request.id, time.time()))
            self.gate.wait(20)

        @self.app.task(name="quiet", ignore_result=True)
        def quiet() -> None: ...

        @self.app.task(name="twice", bind=True, max_retries=1)
        def twice(task: Any) -> None:
            self.starts.append(("twice", task.request.id, time.time()))
            if not task.request.retries:
                raise task.retry(countdown=0.05)

    @hookimpl
    def umbel_worker_ready(self) -> None:
        self.ready.set()

    def said(self, what: str) -> list[str]:
        return [task_id for said, task_id, _ in self.starts if said == what]

    def wait(self, what: str, number: int = 1) -> None:
        until(lambda: len(self.said(what)) >= number, f"{number} starts of {what}")

    def depth(self) -> QueueDepth:
        gateway = cast("LocalGateway", self.app.gateway)
        return gateway.runtime.call(gateway.transport.depth(["default"]))["default"]

    @contextmanager
    def working(self) -> Iterator[None]:
        self.ready.clear()
        worker = self.app.worker()
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            assert self.ready.wait(30)
            yield
        finally:
            self.gate.set()
            worker.request_stop()
            thread.join(40)
            self.app.close()
        assert worker.failure is None


class Counted:
    """Counts what is published of each run; on demand, the broker takes it and does not say so, or the mark is refused."""

    def __init__(self, *, doubts: int = 0, late: int = 0) -> None:
        self.doubts, self.late = doubts, late
        self.taken: Counter[str] = Counter()

    @hookimpl(wrapper=True)
    def umbel_make_transport(self) -> Any:
        transport: Transport = yield
        publish = transport.publish

        async def published(messages: Sequence[Message], *, timeout: float) -> None:
            await publish(messages, timeout=timeout)
            scheduled = [message for message in messages if HEADER_SCHEDULE in message.headers]
            self.taken.update(message.id for message in scheduled)
            if scheduled and self.doubts:
                self.doubts -= 1
                raise BrokerUnavailable("the answer is lost")

        transport.publish = published  # type: ignore[method-assign]  # the fault
        return transport

    @hookimpl(wrapper=True)
    def umbel_make_scheduler(self) -> Any:
        store: Scheduler = yield
        mark = store.mark

        async def marked(entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
            if self.late:
                self.late -= 1
                return False
            return await mark(entries, fence=fence)

        store.mark = marked  # type: ignore[method-assign]  # the fault
        return store
