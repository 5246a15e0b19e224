"""The systems that `brokers.py` compares: for each a program, the command of its worker, and how it sends and waits.

Every task appends its number to one file, the ledger, so that each execution is counted, whatever becomes of the results.
Two worker processes everywhere, each system in the settings that its own documentation recommends for many short tasks.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
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

COLLECT: Final = """
from {system} import chord, group
@app.task
def collect(numbers):
    return sum(numbers)
"""

COLLECT_DRAMATIQ: Final = """
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend as Barriers
broker.add_middleware(GroupCallbacks(Barriers(url=RESULTS)))
@dramatiq.actor(store_results=True)
def collect():
    return -1
"""

FAN_IN: Final[Mapping[str, str]] = {
    "umbel": COLLECT.format(system="umbel"),
    "celery": COLLECT.format(system="celery"),
    "dramatiq": COLLECT_DRAMATIQ,
    "taskiq": "",
}
"""What the module ``program`` needs besides, for `Sender.fan_out` and `Sender.fan_in`."""

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


def program(system: str, *, fan_in: bool = False) -> str:
    """The text of the module ``program`` of this system."""
    kind = system.partition("-")[0]
    return SHARED + PROGRAMS[kind] + (FAN_IN[kind] if fan_in else "")


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
        return self.send(i)()

    def round_trips(self, numbers: range) -> tuple[float, float]:
        """Median and 99th percentile, in ms, of round trips one after the other."""
        taken = []
        for i in numbers:
            begun = time.perf_counter()
            value = self.round_trip(i)
            taken.append(1000 * (time.perf_counter() - begun))
            assert value == i, (value, i)
        return statistics.median(taken), sorted(taken)[int(len(taken) * 0.99)]

    def send(self, i: int, *, patience: int = 10) -> Callable[[], Any]:
        """Send; the answer waits for the result, up to ``patience`` seconds."""
        match self._kind:
            case "umbel" | "celery":
                sent = self._module.noop.delay(i)
                return lambda: sent.get(timeout=patience)
            case "dramatiq":
                sent = self._module.noop.send(i)
                return lambda: sent.get_result(block=True, timeout=1000 * patience)
            case _:
                sent = self._run(self._module.noop.kiq(i))
                waiting = sent.wait_result
                return lambda: self._run(waiting(check_interval=0.001, timeout=patience)).return_value

    def fan_out(self, numbers: range, *, patience: int) -> Callable[[], list[Any]]:
        """Send all as one group; the answer waits for all results, in their order."""
        noop = self._module.noop
        match self._kind:
            case "umbel" | "celery":
                sent = self._module.group([noop.s(i) for i in numbers]).apply_async()
                return lambda: list(sent.get(timeout=patience))
            case "dramatiq":
                sent = self._module.dramatiq.group([noop.message(i) for i in numbers]).run()
                return lambda: list(sent.get_results(block=True, timeout=1000 * patience))
            case _:

                async def send() -> list[Any]:
                    return await asyncio.gather(*[noop.kiq(i) for i in numbers])

                async def gather() -> list[Any]:
                    """A hundred at a time: whoever asks for all of them again and again holds the server up."""
                    found: list[Any] = []
                    for at in range(0, len(handles), 100):
                        waits = [
                            one.wait_result(check_interval=0.01, timeout=patience) for one in handles[at : at + 100]
                        ]
                        found += [result.return_value for result in await asyncio.gather(*waits)]
                    return found

                handles = self._run(send())
                return lambda: self._run(gather())

    def fan_in(self, numbers: range, *, patience: int) -> Any:
        """Run all, then one task with their results; what that returns. ``None`` where the system has nothing like it.

        Dramatiq's last task gets no results; it returns -1.
        """
        module = self._module
        match self._kind:
            case "umbel" | "celery":
                sent = module.chord([module.noop.s(i) for i in numbers], module.collect.s()).apply_async()
                return sent.get(timeout=patience)
            case "dramatiq":
                last = module.collect.message()
                members = module.dramatiq.group([module.noop.message(i) for i in numbers])
                members.add_completion_callback(last)
                members.run()
                return last.get_result(block=True, timeout=1000 * patience)
            case _:
                return None

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
