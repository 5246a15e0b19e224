"""Every hook, by stage. An implementation names only the arguments it wants.

Hooks are synchronous and must not block: those that run in the worker run on its I/O loop unless they say otherwise.
Observers (``umbel_before_*``, ``umbel_after_*``, ``umbel_*ed``) are isolated: one that raises is logged, and neither the
task nor another listener notices. Use a hook to hear of something; use middleware to wrap a task's call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from umbel.markers import hookspec

if TYPE_CHECKING:
    import logging

    import click

    from umbel.app import Umbel
    from umbel.model import Delivery, Message, Outcome, Settlement
    from umbel.ports.clock import Clock
    from umbel.ports.compressor import Compressor
    from umbel.ports.pool import Pool
    from umbel.ports.result_store import ResultStore
    from umbel.ports.scheduler import Scheduler
    from umbel.ports.serializer import Serializer
    from umbel.ports.step import Step
    from umbel.ports.timetable import Timetable
    from umbel.ports.transport import Transport
    from umbel.task import Request
    from umbel.worker.worker import Worker

API_VERSION = (1, 0)
"""Version of the hooks and ports together: a plugin of another major, or of a newer minor, is refused."""

# --- factories: the first implementation that answers wins ---------------------------------------


@hookspec(firstresult=True)
def umbel_make_transport(url: str, options: Mapping[str, Any], clock: Clock) -> Transport | None:
    """Make the transport for a broker URL. No I/O. None: not mine."""


@hookspec(firstresult=True)
def umbel_make_result_store(url: str, options: Mapping[str, Any], clock: Clock) -> ResultStore | None:
    """Make the result store for a URL. No I/O. None: not mine."""


@hookspec(firstresult=True)
def umbel_make_scheduler(url: str, options: Mapping[str, Any], clock: Clock) -> Scheduler | None:
    """Make the scheduler store for a URL. No I/O. None: not mine."""


@hookspec(firstresult=True)
def umbel_make_serializer(name: str, options: Mapping[str, Any]) -> Serializer | None:
    """Make the serializer of that name. None: not mine."""


@hookspec(firstresult=True)
def umbel_make_compressor(name: str, options: Mapping[str, Any]) -> Compressor | None:
    """Make the compressor of that name. None: not mine."""


@hookspec(firstresult=True)
def umbel_make_pool(name: str, options: Mapping[str, Any]) -> Pool | None:
    """Make the pool of that name. None: not mine."""


@hookspec(firstresult=True)
def umbel_make_timetable(schedule: Mapping[str, Any]) -> Timetable | None:
    """Make the timetable of a schedule: its ``when`` and its ``timezone``, plain data. Pure. None: not mine.

    Raises ``ValueError`` for one that is, and is wrong."""


# --- contributions: everybody's are used ---------------------------------------------------------


@hookspec
def umbel_configure(app: Umbel) -> None:
    """The settings of ``app`` are read and its plugins are registered; nothing is connected."""


@hookspec
def umbel_add_middleware(app: Umbel) -> Sequence[Callable[..., Any]] | None:
    """Middleware ``(call_next, request) -> value`` to wrap every task's call; the first named is outermost."""


@hookspec
def umbel_add_steps(worker: Worker) -> Sequence[Step] | None:
    """Components to start and stop with the worker, with what they require."""


@hookspec
def umbel_add_log_handlers(app: Umbel) -> Sequence[logging.Handler] | None:
    """Handlers for the log of a worker that ``umbel worker`` starts, and of its children, instead of standard error.

    Asked once in the worker and once where its children come from, before anything is logged there; children that are forked
    have what was made for their fork server. Nobody is asked where the application has given the root logger handlers.
    """


@hookspec
def umbel_add_commands(cli: click.Group) -> None:
    """Add commands to ``umbel``."""


# --- sending: on the thread that sends; retries and callbacks, on the worker's I/O loop --------------


@hookspec
def umbel_before_publish(messages: Sequence[Message]) -> None:
    """These messages are about to be handed to the broker."""


@hookspec
def umbel_after_publish(messages: Sequence[Message]) -> None:
    """The broker has accepted these messages."""


# --- the worker's life: in the worker, on the I/O loop -------------------------------------------


@hookspec
def umbel_worker_ready(worker: Worker) -> None:
    """Every step is started; the worker consumes."""


@hookspec
def umbel_worker_stopping(worker: Worker) -> None:
    """The worker has been told to stop and claims nothing more."""


@hookspec
def umbel_worker_stopped(worker: Worker) -> None:
    """Every step is stopped."""


# --- a task's way: in the worker, on the I/O loop ------------------------------------------------


@hookspec
def umbel_task_received(delivery: Delivery) -> None:
    """A delivery has come in; nothing is decided yet."""


@hookspec
def umbel_task_started(delivery: Delivery, started: float, pid: int | None) -> None:
    """Work on a delivery has begun at Unix time ``started`` in process ``pid`` (None: it had ended before it was seen).

    Told within a tenth of a second, of short tasks just before their end is dealt with; always before
    ``umbel_task_settled``, once for each delivery whose work has begun. Nothing is looked at if nobody listens.
    """


@hookspec
def umbel_task_settled(settlement: Settlement, outcome: Outcome) -> None:
    """A delivery has ended: what came of it, and how it was settled."""


# --- a task's way: where user code runs ----------------------------------------------------------


@hookspec
def umbel_child_started(app: Umbel) -> None:
    """A child (or, in pools without children, the executor) is about to run its first task: open connections here."""


@hookspec
def umbel_before_task(request: Request) -> None:
    """A task is about to be called, in its own process and thread."""


@hookspec
def umbel_after_task(request: Request, outcome: Outcome) -> None:
    """A task has been called; its outcome is not yet stored."""
