"""The commands of remote control, each answered as Celery's tools expect. Called on the monitor's thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from umbel.errors import UmbelError, UnknownTask
from umbel.model import QueueSpec
from umbel_celery import views

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

_SHOWN: Final = ("exchange", "routing_key", "rate_limit")
"""Options of a task that ``registered`` shows unless it is told which."""


class Control(Protocol):
    """What commands ask of the monitor."""

    events: bool
    """Whether task events are sent."""

    def on_loop(self, work: Callable[[], Any]) -> Any:
        """What ``work``, a function or a coroutine function, gives on the worker's I/O loop."""

    def clock(self) -> int:
        """The logical time."""

    def broker(self) -> Mapping[str, Any]:
        """The connection, as plain data without the password."""

    def beat(self, freq: float | None = None) -> None:
        """Tell that the worker is alive."""


def handlers(worker: Worker, control: Control) -> Mapping[str, Callable[..., Any]]:
    """Commands by name, as ``kombu.pidbox`` calls them: with the node's state, and the request's arguments by name."""
    commands = Commands(worker, control)
    names = [name for name in dir(commands) if not name.startswith("_")]
    table = {name: _called(getattr(commands, name)) for name in names}
    table |= {alias: table[name] for alias, name in _ALIASES.items()}
    return table | {name: _refusing(reason) for name, reason in _REFUSED.items()}


_ALIASES: Final[Mapping[str, str]] = {
    "dump_tasks": "registered",
    "dump_active": "active",
    "dump_reserved": "reserved",
    "dump_schedule": "scheduled",
    "dump_revoked": "revoked",
    "dump_conf": "conf",
}

_NO_PROBE: Final = (
    "a worker of Umbel carries no probe of its memory: see rusage in stats, and [worker] max_memory_per_child"
)
_REFUSED: Final[Mapping[str, str]] = {
    "pool_restart": "a pool of Umbel is not restarted: start another worker, then stop this one",
    "memsample": _NO_PROBE,
    "memdump": _NO_PROBE,
    "objgraph": _NO_PROBE,
}


def _called(command: Callable[..., Any]) -> Callable[..., Any]:
    def call(_: object, **arguments: Any) -> Any:
        try:
            return command(**arguments)
        except UnknownTask:
            return {"error": "unknown task"}
        except (UmbelError, ValueError) as exc:  # said to a person, who needs no name of a class
            return {"error": str(exc)}

    return call


def _refusing(reason: str) -> Callable[..., Any]:
    return lambda _, **arguments: {"error": reason}


class Commands:
    """Every public method is a command; unknown arguments are ignored, as newer tools send more."""

    def __init__(self, worker: Worker, control: Control) -> None:
        self._worker, self._control = worker, control
        self._operations = worker.operations

    # --- looking ---

    def ping(self, **_: Any) -> Any:
        return {"ok": "pong"}

    def stats(self, **_: Any) -> Any:
        clock, broker = self._control.clock(), self._control.broker()
        return self._control.on_loop(lambda: views.stats(self._worker, clock=clock, broker=broker))

    def active(self, **_: Any) -> Any:
        return self._control.on_loop(lambda: self._infos(self._operations.active()))

    def reserved(self, **_: Any) -> Any:
        return self._control.on_loop(lambda: self._infos(self._operations.reserved()))

    def scheduled(self, **_: Any) -> Any:
        """Nothing: what is delayed waits in the broker."""
        return []

    def revoked(self, **_: Any) -> Any:
        return self._control.on_loop(lambda: list(self._operations.revoked))

    def query_task(self, ids: Any = (), **_: Any) -> Any:
        wanted = set(_ids(ids))

        def look() -> dict[str, Any]:
            return {
                task.delivery.message.id: [
                    "reserved" if task.started is None else "active",
                    views.task_info(task, self._worker.name),
                ]
                for task in self._operations.held()
                if task.delivery.message.id in wanted
            }

        return self._control.on_loop(look)

    def registered(self, taskinfoitems: Sequence[str] | None = None, **_: Any) -> Any:
        wanted = tuple(taskinfoitems or _SHOWN)
        return self._control.on_loop(lambda: views.registered(self._worker, wanted))

    def active_queues(self, **_: Any) -> Any:
        return self._control.on_loop(lambda: [views.queue_info(spec) for spec in self._operations.queues()])

    def conf(self, **_: Any) -> Any:
        return self._control.on_loop(lambda: views.configuration(self._worker))

    def report(self, **_: Any) -> Any:
        settings = self._control.on_loop(lambda: views.configuration(self._worker))
        lines = [f"{name}: {value!r}" for name, value in settings.items()]
        return {"ok": "\n".join([f"umbel worker {self._worker.name}", *lines])}

    def clock(self, **_: Any) -> Any:
        return {"clock": self._control.clock()}

    def hello(self, from_node: str = "", revoked: Any = None, **_: Any) -> Any:
        if from_node == self._worker.name:
            return None

        def merge() -> list[str]:
            if revoked:  # a list, or, from Celery before 5.7, a dict
                self._operations.revoke([str(each) for each in revoked])
            return list(self._operations.revoked)

        return {"revoked": self._control.on_loop(merge), "clock": self._control.clock()}

    # --- tasks ---

    def revoke(self, task_id: Any = (), terminate: bool = False, signal: Any = None, **_: Any) -> Any:
        ids = _ids(task_id)

        def act() -> Mapping[str, Sequence[str]]:
            return self._operations.revoke(ids, terminate=bool(terminate), grace=_grace(signal))

        struck = self._control.on_loop(act) if ids else {"running": []}
        if terminate:
            return {"ok": f"terminate: {', '.join(struck['running']) or 'tasks unknown'}"}
        return {"ok": f"tasks {', '.join(ids)} flagged as revoked"}

    def terminate(self, task_id: Any = (), signal: Any = None, **_: Any) -> Any:
        return self.revoke(task_id, terminate=True, signal=signal)

    def revoke_by_stamped_headers(
        self, headers: Mapping[str, Any], terminate: bool = False, signal: Any = None, **_: Any
    ) -> Any:
        """One of the headers, with one of its values, is enough."""

        def act() -> list[str]:
            struck = [
                self._operations.revoke(headers={name: value}, terminate=bool(terminate), grace=_grace(signal))
                for name, value in headers.items()
            ]
            return sorted({task_id for each in struck for task_id in each["running"]})

        running = self._control.on_loop(act)
        if terminate:
            return {"ok": f"headers {dict(headers)} flagged as revoked, terminating {', '.join(running) or 'nothing'}"}
        return {"ok": f"headers {dict(headers)} flagged as revoked, but not terminated"}

    def rate_limit(self, task_name: str, rate_limit: Any = None, **_: Any) -> Any:
        text = str(rate_limit or "").strip()
        rate = None if text in ("", "0", "None") else text if "/" in text else f"{text}/s"
        self._control.on_loop(lambda: self._operations.rate_limit(task_name, rate))
        return {"ok": "new rate limit set successfully" if rate else "rate limit disabled successfully"}

    def time_limit(self, task_name: str, hard: Any = None, soft: Any = None, **_: Any) -> Any:
        limits = [float(limit) if limit else None for limit in (hard, soft)]
        self._control.on_loop(lambda: self._operations.time_limits(task_name, *limits))
        return {"ok": "time limits set successfully"}

    # --- events ---

    def enable_events(self, **_: Any) -> Any:
        before, self._control.events = self._control.events, True
        return {"ok": "task events already enabled" if before else "task events enabled"}

    def disable_events(self, **_: Any) -> Any:
        before, self._control.events = self._control.events, False
        return {"ok": "task events disabled" if before else "task events already disabled"}

    def heartbeat(self, **_: Any) -> Any:
        self._control.beat(5.0)

    def election(self, **_: Any) -> Any:
        """No candidate: the workers that are decide among themselves, and we acknowledge what they say."""

    # --- the worker ---

    def pool_grow(self, n: int = 1, **_: Any) -> Any:
        self._resize(int(n))
        return {"ok": "pool will grow"}

    def pool_shrink(self, n: int = 1, **_: Any) -> Any:
        self._resize(-int(n))
        return {"ok": "pool will shrink"}

    def _resize(self, by: int) -> None:
        async def resize() -> None:
            if "autoscaler" in self._operations.stats():
                raise ValueError("the number of slots follows the work: change its bounds, with autoscale")
            await self._operations.resize_pool(self._worker.concurrency + by)

        self._control.on_loop(resize)

    def autoscale(self, max: int | None = None, min: int | None = None, **_: Any) -> Any:
        """Works where the settings give no bounds, too: from then on the worker scales."""
        most, least = (None if bound is None else int(bound) for bound in (max, min))
        now = self._control.on_loop(lambda: self._operations.autoscale(least=least, most=most))
        return {"ok": f"autoscale now max={now['max']} min={now['min']}"}

    def add_consumer(
        self,
        queue: str,
        exchange: str | None = None,
        exchange_type: str | None = None,
        routing_key: str | None = None,
        **_: Any,
    ) -> Any:
        named = exchange if exchange and exchange != queue else None
        spec: str | QueueSpec = queue
        if named:
            spec = QueueSpec(
                name=queue, exchange=named, exchange_type=exchange_type or "direct", routing_key=routing_key
            )
        added = self._control.on_loop(lambda: self._operations.add_queue(spec))
        return {"ok": f"add consumer {queue}" if added else f"already consuming from {queue!r}"}

    def cancel_consumer(self, queue: str, **_: Any) -> Any:
        self._control.on_loop(lambda: self._operations.cancel_queue(queue))
        return {"ok": f"no longer consuming from {queue}"}

    def shutdown(self, **_: Any) -> Any:
        self._control.on_loop(self._operations.shutdown)

    def _infos(self, tasks: Iterable[Any]) -> list[dict[str, Any]]:
        return [views.task_info(task, self._worker.name) for task in tasks]


def _grace(signal: Any) -> float:
    """Seconds before a process is killed: SIGKILL means at once, every other signal that the task is asked first."""
    return 0.0 if str(signal or "").upper() in ("SIGKILL", "KILL", "9") else 5.0


def _ids(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else [str(each) for each in given or ()]
