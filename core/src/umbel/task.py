"""Tasks: a function, how it behaves, and the ways to send it."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, ParamSpec, TypedDict, TypeVar, Unpack, cast

from attrs import evolve, field, frozen

from umbel import unique
from umbel.canvas.compose import Group, chunks, mapped
from umbel.canvas.signature import Canvas, Signature
from umbel.errors import MaxRetriesExceeded, Replaced, Retry
from umbel.model import Message, TaskOptions, by_position
from umbel.plugins.loader import importing
from umbel.protocol import Invocation
from umbel.result import AsyncResult

if TYPE_CHECKING:
    from umbel.app import Umbel

P = ParamSpec("P")
R = TypeVar("R")


class CallOptions(TypedDict, total=False):
    """What one call may say over the task's own options."""

    task_id: str
    """The id under which it runs and its result is kept; else a new one."""
    countdown: float
    """Seconds from now before which it is not run."""
    eta: datetime
    """The moment before which it is not run."""
    expires: float | datetime
    """Seconds from now, or the moment, from which it is not run any more."""
    queue: str
    """The queue to send it to."""
    exchange: str
    """A named exchange to send it to, instead of a queue (capability ``exchanges``)."""
    routing_key: str
    """With ``exchange``: the key by which its bindings choose the queues."""
    priority: int
    """0 to 9, higher is sooner."""
    key: str
    """The key of its concurrency limit; else the one that ``concurrency_key`` gives."""
    serializer: str
    """Plugin that writes the message."""
    compression: str
    """Plugin that compresses it; ``none``: no compression."""
    headers: Mapping[str, Any]
    """Headers of the caller's own, seen as ``request.headers`` and kept by retries."""
    link: Any
    """Signatures to send with the result when it succeeds."""
    link_error: Any
    """Signatures to send with the task's id when it fails."""
    time_limit: float
    """Seconds after which it is killed."""
    soft_time_limit: float
    """Seconds after which ``SoftTimeLimitExceeded`` is raised in it."""
    ignore_result: bool | None
    """None: as the task on the worker says."""
    shadow: str
    """Another name to show in monitoring."""
    argsrepr: str
    """What monitoring shows instead of the positional arguments."""
    kwargsrepr: str
    """What monitoring shows instead of the keyword arguments."""
    reply_to: str
    """Where result stores that send replies are to send the result."""
    timeout: float
    """Seconds within which the broker must confirm."""
    root_id: str
    """Id of the first task of the workflow; else that of the running task's, or its own."""
    parent_id: str
    """Id of the task that sends it; else that of the running one."""
    group_id: str
    """The group that it is a member of."""
    group_index: int
    """Its place in that group."""
    chain: Sequence[Mapping[str, Any]]
    """What runs after it, as plain signatures, in reverse."""
    chord: Mapping[str, Any]
    """What runs when its whole group has ended, as a plain signature."""
    retries: int
    """How often it has been retried."""
    replaced_task_nesting: int
    """How often a task has been replaced on the way to it."""
    stamped_headers: Sequence[str]
    """Names of the stamps."""
    stamps: Mapping[str, Any]
    """Headers that the whole workflow carries."""
    origin: str
    """Who sends it; else this process."""
    unique: str | float | None
    """As the task's option of that name; None: this call is not unique. Likewise the others."""
    unique_key: str
    """The key itself."""
    on_conflict: str
    debounce: float | None
    debounce_max: float | None
    throttle: float | None
    throttle_edge: str


@frozen(kw_only=True, eq=False, weakref_slot=False)
class Request:
    """One execution of a task, as the task itself sees it: ``self.request``."""

    task: Task[..., Any]
    invocation: Invocation
    message: Message
    delivery_count: int = 1
    hostname: str = ""
    """The worker's name."""
    started: float = 0.0
    """``time.monotonic()`` when the work began; 0: it runs in no worker."""
    called_directly: bool = False
    """True where the function was simply called: nothing was sent, and there is nothing to retry."""
    is_eager: bool = False
    children: list[str] = field(factory=list)
    """Ids of the tasks that this one has sent."""

    @property
    def id(self) -> str:
        return self.invocation.id

    @property
    def root_id(self) -> str | None:
        return self.invocation.root_id

    @property
    def parent_id(self) -> str | None:
        return self.invocation.parent_id

    @property
    def retries(self) -> int:
        """How often the task has been retried before this execution."""
        return self.invocation.retries

    @property
    def args(self) -> Sequence[Any]:
        return self.invocation.args

    @property
    def kwargs(self) -> Mapping[str, Any]:
        return self.invocation.kwargs

    @property
    def headers(self) -> Mapping[str, Any]:
        """The caller's own headers."""
        return self.invocation.headers

    @property
    def stamps(self) -> Mapping[str, Any]:
        """Headers that the whole workflow carries, or this task of it (``Canvas.stamp``)."""
        return self.invocation.stamps

    @property
    def stamped_headers(self) -> Sequence[str]:
        """Their names."""
        return self.invocation.stamped_headers or ()

    @property
    def group(self) -> str | None:
        return self.invocation.group

    def cancelled(self) -> bool:
        """Whether the task is asked to end: for loops that stop at a place of their own choosing (``cancel="flag"``).

        Asks the worker, at most ten times a second. False outside a worker. Thread-safe.
        """
        return not self.called_directly and self.task.app.gateway.cancelled(self.id)

    @property
    def delivery_info(self) -> Mapping[str, Any]:
        return {
            "exchange": self.message.properties.get("exchange", ""),
            "routing_key": self.message.properties.get("routing_key", self.message.queue),
            "priority": self.message.priority,
            "redelivered": self.delivery_count > 1,
        }


make_request: Final = by_position(Request)
"""``Request`` by position."""

_current: ContextVar[Request | None] = ContextVar("umbel_request", default=None)


def current_request() -> Request | None:
    """The execution that the caller is part of; None outside a task."""
    return _current.get()


class Task(Generic[P, R]):
    """A registered function. Calling it runs it here and now; ``delay`` and its kin send it to a worker.

    Subclass it (``@app.task(base=MyTask)``) to handle ends: ``on_success``, ``on_failure``, ``on_retry`` run where the
    task ran, after its function; one that raises is logged and changes nothing.
    """

    def __init__(
        self,
        app: Umbel,
        run: Callable[..., Any],
        *,
        name: str,
        bind: bool = False,
        options: TaskOptions | None = None,
        handlers: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.app = app
        self.run = run
        self.name = name
        self.bind = bind
        self.declared = options or TaskOptions()
        self._options: TaskOptions | None = None
        for handler, function in (handlers or {}).items():
            setattr(self, handler, function)
        update_wrapper(self, run)

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = self.run(self, *args, **kwargs) if self.bind else self.run(*args, **kwargs)
        return result

    @property
    def options(self) -> TaskOptions:
        """The task's options after the settings had their say."""
        # Not a cached_property: its lock, on Python 3.11, could be held by another thread at a fork.
        if (options := self._options) is None:
            options = self._options = self.app.options_of(self.name, self.declared)
        return options

    def forget_options(self) -> None:
        """The settings have changed: read them again at the next use."""
        self._options = None

    def override(self, **changes: Any) -> None:
        """Change options in this process, over the settings, until ``forget_options``. Raises ``TypeError``, ``ValueError``."""
        self._options = evolve(self.options, **changes)

    @property
    def request(self) -> Request:
        """The execution that the caller is part of. Outside a worker: an empty one, ``called_directly``."""
        request = _current.get()
        if request is None:
            return Request(
                task=self,
                invocation=Invocation(id="", task=self.name),
                message=Message(queue=""),
                called_directly=True,
            )
        return request

    # --- sending ---

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Send the task; return its handle once the broker has accepted it.

        Thread-safe, fork-safe. Raises ``EncodeError`` before anything is sent, ``PublishError`` within the deadline.
        """
        return self.apply_async(args, kwargs)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """``delay`` for event loops: never blocks the loop."""
        return await self.aapply_async(args, kwargs)

    def apply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Unpack[CallOptions]
    ) -> AsyncResult[R]:
        """``delay`` with options of this one call (see ``CallOptions``)."""
        timeout = options.pop("timeout", None)
        plan = self.unique_plan(args, kwargs, options) if unique.wanted(self.options, options) else None
        message = self.message(args, kwargs, **options)
        if plan is not None:
            return self._sent(unique.send(self.app, plan, message, timeout))
        self.app.client.send([message], timeout)
        return self.handle(message.id)

    async def aapply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Unpack[CallOptions]
    ) -> AsyncResult[R]:
        """``apply_async`` for event loops."""
        timeout = options.pop("timeout", None)
        plan = self.unique_plan(args, kwargs, options) if unique.wanted(self.options, options) else None
        message = self.message(args, kwargs, **options)
        if plan is not None:
            return self._sent(await unique.asend(self.app, plan, message, timeout))
        await self.app.client.asend([message], timeout)
        return self.handle(message.id)

    def map_delay(
        self, calls: Iterable[Sequence[Any]], *, batch: int = 1000, **options: Unpack[CallOptions]
    ) -> list[AsyncResult[R]]:
        """Send one task for each tuple of arguments, in publishes of ``batch``; memory stays bounded by the handles.

        Raises as ``delay``; then earlier batches have been sent. Unique calls are sent one by one.
        """
        if unique.wanted(self.options, options):
            return [self.apply_async(args, **options) for args in calls]
        timeout = options.pop("timeout", None)
        handles: list[AsyncResult[R]] = []
        for messages in _batches((self.message(args, None, **options) for args in calls), batch):
            self.app.client.send(messages, timeout)
            handles += [self.handle(message.id) for message in messages]
        return handles

    async def amap_delay(
        self, calls: Iterable[Sequence[Any]], *, batch: int = 1000, **options: Unpack[CallOptions]
    ) -> list[AsyncResult[R]]:
        """``map_delay`` for event loops."""
        if unique.wanted(self.options, options):
            return [await self.aapply_async(args, **options) for args in calls]
        timeout = options.pop("timeout", None)
        handles: list[AsyncResult[R]] = []
        for messages in _batches((self.message(args, None, **options) for args in calls), batch):
            await self.app.client.asend(messages, timeout)
            handles += [self.handle(message.id) for message in messages]
        return handles

    def message(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Unpack[CallOptions]
    ) -> Message:
        """The message that a call would send. Raises ``EncodeError``."""
        args, kwargs = self._plain(args, kwargs)
        return self.app.client.message(self.name, args, kwargs, self.options, **options)

    def _plain(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[Sequence[Any], Mapping[str, Any]]:
        if self.options.typed:
            unstructure, what = typing_of_tasks().unstructure, f"an argument of task {self.name!r}"
            return unstructure(list(args), what), unstructure(dict(kwargs or {}), what)
        return args, kwargs or {}

    def unique_plan(
        self, args: Sequence[Any], kwargs: Mapping[str, Any] | None, call: Mapping[str, Any]
    ) -> unique.Plan | None:
        """``unique.plan`` of a call of this task."""
        args, kwargs = self._plain(args, kwargs)
        run = partial(self.run, None) if self.bind else self.run
        return unique.plan(self.name, args, kwargs, self.options, cast("dict[str, Any]", call), run)

    def _sent(self, sent: str | unique.Conflict) -> AsyncResult[R]:
        if isinstance(sent, str):
            return self.handle(sent)
        structure = self._structure_result if self.options.typed else None
        return unique.handle(self.app, sent, structure)

    def handle(self, task_id: str) -> AsyncResult[R]:
        """A handle on a sent call of this task."""
        return AsyncResult(task_id, self.app, self._structure_result if self.options.typed else None)

    def _structure_result(self, value: Any) -> R:
        result: R = typing_of_tasks().structure_result(self.run, value)
        return result

    # --- as a value ---

    def s(self, *args: Any, **kwargs: Any) -> Signature:
        """A call of this task as a value, that takes results of the tasks before it in front."""
        return Signature(task=self.name, args=args, kwargs=kwargs, app=self.app)

    def si(self, *args: Any, **kwargs: Any) -> Signature:
        """A call of this task as a value, that ignores results of the tasks before it."""
        return Signature(task=self.name, args=args, kwargs=kwargs, immutable=True, app=self.app)

    def signature(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> Signature:
        """A call of this task with options, as a value."""
        return Signature(task=self.name, args=tuple(args), kwargs=kwargs or {}, options=options, app=self.app)

    def map(self, items: Iterable[Any]) -> Signature:
        """One task that calls this one for each of ``items``, and returns the list of what it returns."""
        return mapped(self.s(), items, star=False)

    def starmap(self, items: Iterable[Sequence[Any]]) -> Signature:
        """As ``map``, of items that are each a list of arguments."""
        return mapped(self.s(), items, star=True)

    def chunks(self, items: Iterable[Sequence[Any]], size: int) -> Group:
        """A group of tasks that each call this one for ``size`` of ``items``. Read as it is sent: once, where it can be."""
        return chunks(self.s(), items, size)

    # --- inside the task ---

    def add_to_group(self, *members: Canvas[Any]) -> list[AsyncResult[Any]]:
        """Add members to the group that this task is a member of, while it runs, and return their handles once they are sent.

        What waits for the group waits for them too; in its list their results stand behind this task's own. Blocks. Raises
        ``UmbelError`` where the task is no member of a group that something waits for, ``NotSupported`` for members that are
        neither tasks nor chains of tasks, and as ``delay``.
        """
        from umbel.canvas.growing import added_by  # few tasks do; it knows how workflows are sent, which knows tasks

        messages = added_by(self.request, members)
        self.app.client.send(messages)
        return [self.app.result(message.id) for message in messages]

    def replace(self, canvas: Canvas[Any]) -> NoReturn:
        """End this execution and let ``canvas`` go on in its place, under its id: who waits for it gets the result of that.

        ``raise self.replace(…)`` reads well. Raises ``Replaced``, which the worker understands; where the task was called
        directly there is nothing to go on in the place of, and it raises that to the caller.
        """
        raise Replaced(canvas)

    def retry(
        self,
        *,
        exc: BaseException | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        max_retries: int | None = None,
    ) -> NoReturn:
        """Send the task again later, under the same id, and end this execution. ``raise self.retry(…)`` reads well.

        Raises ``Retry``, which the worker understands; when the retries are spent, ``exc`` or ``MaxRetriesExceeded``;
        where the task was called directly, ``exc`` or ``Retry``, and nothing is sent.
        """
        limit = self.options.max_retries if max_retries is None else max_retries
        request = self.request
        if limit is not None and request.retries >= limit:
            raise exc or MaxRetriesExceeded(f"task {self.name} ({request.id}) has been retried {limit} times")
        if request.called_directly and exc is not None:
            raise exc
        if eta is not None:
            countdown = (eta if eta.tzinfo else eta.replace(tzinfo=UTC)).timestamp() - self.app.clock.time()
        delay = self.options.retry_delay if countdown is None else countdown
        raise Retry(max(0.0, delay), exc) from exc

    def backoff(self, retries: int) -> float:
        """Seconds to wait before retry number ``retries + 1`` of an ``autoretry_for`` exception."""
        options = self.options
        if not options.retry_backoff:
            return options.retry_delay
        delay: float = min(options.retry_backoff * 2.0 ** min(retries, 64), options.retry_backoff_max)
        return random.uniform(0, delay) if options.retry_jitter else delay  # spread, not a secret

    def update_state(self, state: str, meta: Any = None) -> None:
        """Tell progress: store ``state`` (any name but a final one) with ``meta``. Blocks until it is stored."""
        self.app.client.put_state(self.request, state, meta)

    async def aupdate_state(self, state: str, meta: Any = None) -> None:
        """``update_state`` for ``async def`` tasks: never blocks the loop that others run on."""
        await self.app.client.aput_state(self.request, state, meta)

    # --- ends, for subclasses ---

    def on_success(self, retval: Any, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The function returned ``retval``."""

    def on_failure(
        self, exc: BaseException, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any], einfo: str
    ) -> None:
        """The task has failed for good; ``einfo`` is the traceback as text."""

    def on_retry(
        self, exc: BaseException, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any], einfo: str
    ) -> None:
        """The task will be retried because of ``exc``."""


class AsyncTask(Task[P, R]):
    """A task whose function is ``async def``: called directly it gives a coroutine; sent, its handle gives the value."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:  # type: ignore[override]  # the one difference
        result: Coroutine[Any, Any, R] = self.run(self, *args, **kwargs) if self.bind else self.run(*args, **kwargs)
        return result


def typing_of_tasks() -> Any:
    """The module ``umbel.typed``, imported on first use: it brings cattrs."""
    with importing():
        from umbel import typed
    return typed


def _batches(messages: Iterable[Message], size: int) -> Iterable[list[Message]]:
    batch: list[Message] = []
    for message in messages:
        batch.append(message)
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def with_options(options: TaskOptions, **changes: Any) -> TaskOptions:
    """``options`` with ``changes``; the names of ``TaskOptions`` are the decorator's."""
    return evolve(options, **changes)
