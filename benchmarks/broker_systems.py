"""The systems that `brokers.py` compares: for each a program, the command of its worker, and how it sends and waits.

Every task appends its number to one file, the ledger, so that each execution is counted, whatever becomes of the results.
Two worker processes everywhere, each system in the settings that its own documentation recommends for many short tasks.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Final

SHARED: Final = """
import os
BROKER, RESULTS = os.environ["BENCH_BROKER"], os.environ["BENCH_RESULTS"]
ledger = os.open(os.environ["BENCH_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(i):
    os.write(ledger, b"%7d\\n" % i)
    return i
"""

UMBEL: Final = """
from umbel import Umbel
settings = {"worker.concurrency": 2, "worker.log_level": "WARNING"}
if os.environ["BENCH_SYSTEM"] == "umbel-classic":
    settings["queues.default.type"] = "classic"
app = Umbel("bench", broker=BROKER, results=RESULTS or "disabled", settings=settings)
@app.task
def noop(i: int) -> int:
    return note(i)
"""

CELERY: Final = """
from celery import Celery
app = Celery("program", broker=BROKER, backend=RESULTS or None)
app.conf.update(
    worker_prefetch_multiplier=128,
    task_acks_late=os.environ["BENCH_SYSTEM"] == "celery-late",
    task_ignore_result=not RESULTS,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)
@app.task
def noop(i):
    return note(i)
"""

DRAMATIQ: Final = """
import dramatiq
from dramatiq.middleware import AgeLimit, Retries, ShutdownNotifications, TimeLimit
middleware = [AgeLimit(), TimeLimit(), ShutdownNotifications(), Retries()]
if RESULTS:
    from dramatiq.results import Results
    from dramatiq.results.backends import RedisBackend
    middleware.append(Results(backend=RedisBackend(url=RESULTS)))
if BROKER.startswith("redis"):
    from dramatiq.brokers.redis import RedisBroker
    broker = RedisBroker(url=BROKER, middleware=middleware)
else:
    from dramatiq.brokers.rabbitmq import RabbitmqBroker
    broker = RabbitmqBroker(url=BROKER, middleware=middleware)
dramatiq.set_broker(broker)
@dramatiq.actor(**({"store_results": True} if RESULTS else {}))
def noop(i):
    return note(i)
"""

TASKIQ: Final = """
if BROKER.startswith("redis"):
    from taskiq_redis import RedisStreamBroker
    broker = RedisStreamBroker(BROKER, consumer_id="0")
else:
    from taskiq_aio_pika import AioPikaBroker
    broker = AioPikaBroker(BROKER, qos=256)
if RESULTS:
    from taskiq_redis import RedisAsyncResultBackend
    broker = broker.with_result_backend(RedisAsyncResultBackend(RESULTS, result_ex_time=86400))
@broker.task
async def noop(i):
    return note(i)
"""

PROGRAMS: Final[Mapping[str, str]] = {"umbel": UMBEL, "celery": CELERY, "dramatiq": DRAMATIQ, "taskiq": TASKIQ}

_CELERY_WORKER: Final = [
    "celery", "-A", "program", "worker", "-O", "fair", "-l", "WARNING",
    "--without-gossip", "--without-mingle", "--without-heartbeat",
]  # fmt: skip
WORKERS: Final[Mapping[str, Sequence[str]]] = {
    "umbel": ["umbel", "-A", "program", "worker"],
    "umbel-classic": ["umbel", "-A", "program", "worker"],
    "celery": [*_CELERY_WORKER, "-P", "prefork", "-c", "2"],
    "celery-late": [*_CELERY_WORKER, "-P", "prefork", "-c", "2"],
    "celery-solo": [*_CELERY_WORKER, "-P", "solo"],
    "dramatiq": ["dramatiq", "program", "-p", "2", "-t", "8"],
    "taskiq": ["taskiq", "worker", "program:broker", "-w", "2", "--max-prefetch", "100", "--log-level", "WARNING"],
}
"""``celery`` acknowledges before the task (its default, and its fastest), ``celery-late`` after it, as all others do."""
ONLY_ON: Final = {"umbel-classic": "rabbitmq"}
"""On RabbitMQ Umbel makes quorum queues, unless it is told to make classic ones, which Celery and Dramatiq make."""


def program(system: str) -> str:
    """The text of the module ``program`` of this system."""
    return SHARED + PROGRAMS[system.partition("-")[0]]


def worker_command(system: str) -> list[str]:
    return [sys.executable, "-m", *WORKERS[system]]


class Sender:
    """The producing side, the same verbs for every system. Synchronous: it owns a loop where the system needs one."""

    def __init__(self, system: str, module: Any) -> None:
        self._kind = system.partition("-")[0]
        self._module = module
        self._loop = asyncio.new_event_loop() if self._kind == "taskiq" else None
        if self._kind == "taskiq":
            self._run(module.broker.startup())

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        assert self._loop is not None
        return self._loop.run_until_complete(work)

    def one_by_one(self, numbers: Iterable[int]) -> None:
        if self._kind == "taskiq":

            async def send() -> None:
                for i in numbers:
                    await self._module.noop.kiq(i)

            self._run(send())
            return
        send_one: Callable[[int], Any] = getattr(self._module.noop, "send" if self._kind == "dramatiq" else "delay")
        for i in numbers:
            send_one(i)

    def in_bulk(self, numbers: range) -> None:
        """In the way that the system has for many at once; where it has none, one by one."""
        match self._kind:
            case "umbel":
                self._module.noop.map_delay((i,) for i in numbers)
            case "taskiq":

                async def send() -> None:
                    for start in range(0, len(numbers), 100):
                        await asyncio.gather(*[self._module.noop.kiq(i) for i in numbers[start : start + 100]])

                self._run(send())
            case _:
                self.one_by_one(numbers)

    def round_trip(self, i: int) -> Any:
        """Send, and wait for the result."""
        match self._kind:
            case "umbel" | "celery":
                return self._module.noop.delay(i).get(timeout=10)
            case "dramatiq":
                return self._module.noop.send(i).get_result(block=True, timeout=10_000)
            case _:

                async def trip() -> Any:
                    sent = await self._module.noop.kiq(i)
                    return (await sent.wait_result(check_interval=0.001, timeout=10)).return_value

                return self._run(trip())

    def close(self) -> None:
        if self._loop is not None:
            self._run(self._module.broker.shutdown())
            self._loop.close()


def environment(system: str, broker: str, results: str, ledger: str) -> dict[str, str]:
    return {
        **os.environ,
        "BENCH_SYSTEM": system,
        "BENCH_BROKER": broker,
        "BENCH_RESULTS": results,
        "BENCH_LEDGER": ledger,
    }
