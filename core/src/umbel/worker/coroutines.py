"""The part of an executor that knows of coroutines: tasks and middleware that are ``async def``.

On a running loop they are awaited (``aexecute``). Elsewhere a thread runs them on a loop of its own (``execute``).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from umbel.errors import NotSupported, TaskCancelled
from umbel.model import Message, Outcome, Verdict
from umbel.ports.interruption import unwrapped
from umbel.task import Request, _current
from umbel.unique import HEADER as UNIQUE
from umbel.worker.own_loop import OwnLoop

if TYPE_CHECKING:
    from umbel.app import Middleware, Umbel
    from umbel.worker.outcomes import Records

logger = logging.getLogger("umbel.task")

Call = Callable[[Request], Any]


class Coroutines(ABC):
    """What ``TaskExecutor`` does with coroutines."""

    _app: Umbel
    _records: Records
    _tells: bool
    _before: Any
    _after: Any

    def _compose(self, middleware: Sequence[Middleware]) -> None:
        """Wrap the call of a task, the first outermost. Raises ``NotSupported`` where one that is not ``async`` is inside of one
        that is: it would have to wait on the very loop that it waits for.
        """
        self._threads = threading.local()
        self._loops: dict[int, OwnLoop] = {}
        self._are_async: dict[str, bool] = {}
        inner = len(middleware)
        while inner and _is_async(middleware[inner - 1]):
            inner -= 1
        if wrong := [one for one in middleware[:inner] if _is_async(one)]:
            raise NotSupported(
                f"middleware {_name(middleware[inner - 1])} is inside of {_name(wrong[-1])}, which is async def: make it"
                " async def too, or name it first in Umbel(middleware=[…])"
            )
        self._native = inner == 0
        self._acall: Call = self._invoke
        for one in reversed(middleware[inner:]):
            self._acall = partial(one, _awaitable(self._acall))
        self._wrapped: Call = self._call
        for one in reversed(middleware[:inner]):
            self._wrapped = partial(one, self._wrapped)

    # --- on a loop of this thread's own ---

    def _call(self, request: Request) -> Any:
        value = self._acall(request)
        return self._await(value) if inspect.iscoroutine(value) else value

    def _await(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on this thread's own loop, which lives as long as the thread."""
        own: OwnLoop | None = getattr(self._threads, "loop", None)
        if own is None:
            own = self._threads.loop = OwnLoop()
        ident = threading.get_ident()
        self._loops[ident] = own
        try:
            return own.run(coroutine)
        finally:
            self._loops.pop(ident, None)
            if not own.sound:  # an interruption has struck the loop itself and left the task half done
                self._threads.loop = None
                own.close()

    def interrupt_thread(self, thread: int, exception: type[BaseException]) -> bool:
        """Raise ``exception`` in the coroutine that waits on that thread's own loop; False if there is none that waits."""
        own = self._loops.get(thread)
        return own is not None and own.interrupt(exception)

    # --- on the running loop ---

    def awaits(self, payload: tuple[Any, ...]) -> bool:
        """See ``AsyncExecutor``. Middleware that is not ``async`` has every task run in a thread, where it can wait."""
        if payload[0] != "run" or not self._native:
            return False
        name = Message.from_plain(payload[1]).task
        known = self._are_async.get(name)
        if known is None:
            tasks = self._app.tasks
            known = self._are_async[name] = name in tasks and inspect.iscoroutinefunction(tasks[name].run)
        return known

    async def aexecute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        """See ``AsyncExecutor``; the same steps as in ``execute``, with the one call awaited."""
        _, plain, queue, count, _ = payload
        message = Message.from_plain(plain)
        started = time.monotonic()
        try:
            outcome = await self._arun(message, queue, count, started)
        except TaskCancelled:
            outcome = Outcome(verdict=Verdict.CANCELLED, task_id=message.id, task=message.task)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # the soft limit, or a fault, while the outcome was being written
            outcome = self._unwritten(message, exc)
        return self._records.to_plain(outcome, message)

    async def _arun(self, message: Message, queue: str, count: int, started: float) -> Outcome:
        request = self._open(message, queue, count)
        if isinstance(request, Outcome):
            return request
        if self._tells or request.task.options.track_started or UNIQUE in message.headers:
            await asyncio.to_thread(self._begin, request)
        token = _current.set(request)
        try:
            if self._before:
                self._before(request=request)
            outcome = self._attempt(request, queue, started, await _awaited(self._acall, request))
            if self._after:
                self._after(request=request, outcome=outcome)
        finally:
            _current.reset(token)
        return outcome

    # --- the other part's ---

    @abstractmethod
    def _invoke(self, request: Request) -> Any:
        """The innermost call: the value of the function, or its coroutine."""

    @abstractmethod
    def _open(self, message: Message, queue: str, count: int) -> Request | Outcome: ...

    @abstractmethod
    def _attempt(self, request: Request, queue: str, started: float, call: Call) -> Outcome: ...

    @abstractmethod
    def _begin(self, request: Request) -> None: ...

    @abstractmethod
    def _unwritten(self, message: Message, exc: BaseException) -> Outcome:
        """The outcome of a task whose outcome could not be written."""


def _is_async(middleware: Middleware) -> bool:
    return inspect.iscoroutinefunction(middleware) or inspect.iscoroutinefunction(getattr(middleware, "__call__", None))  # noqa: B004  # is it async


def _name(middleware: Middleware) -> str:
    return getattr(middleware, "__qualname__", type(middleware).__qualname__)


def _awaitable(call: Call) -> Call:
    """``call`` for middleware that awaits it, whatever it wraps."""

    async def call_next(request: Request) -> Any:
        value = call(request)
        return await value if inspect.iscoroutine(value) else value

    return call_next


async def _awaited(call: Call, request: Request) -> Call:
    """What ends as ``call`` has ended: returns the same, or raises the same."""
    try:
        value = call(request)
        if inspect.iscoroutine(value):
            value = await value
    except BaseException as exc:
        return partial(_raise, unwrapped(exc))
    return lambda request: value


def _raise(exc: BaseException, request: Request) -> Any:
    raise exc
