"""What ``@app.task`` takes and gives, for type checkers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypedDict, TypeVar, overload

from umbel.task import AsyncTask, Task

P = ParamSpec("P")
R = TypeVar("R")


class DeclaredOptions(TypedDict, total=False):
    """What ``@app.task(…)`` takes, beside ``name``, ``bind`` and ``base``: the fields of ``TaskOptions``, and handlers."""

    queue: str | None
    serializer: str | None
    compression: str | None
    max_retries: int | None
    retry_delay: float
    autoretry_for: tuple[type[BaseException], ...]
    dont_autoretry_for: tuple[type[BaseException], ...]
    retry_backoff: float
    retry_backoff_max: float
    retry_jitter: bool
    ack: str
    ignore_result: bool
    time_limit: float | None
    soft_time_limit: float | None
    rate_limit: str | None
    rate_limit_scope: str
    concurrency_limit: int | None
    concurrency_key: str | None
    expires: float | None
    priority: int | None
    max_deliveries: int | None
    dead_letter: bool
    track_started: bool
    unique: str | float | None
    unique_key: str | Callable[..., object] | None
    on_conflict: str
    debounce: float | None
    debounce_max: float | None
    throttle: float | None
    throttle_edge: str
    cancel: str
    typed: bool
    throws: tuple[type[BaseException], ...]
    on_success: Callable[..., Any]
    on_failure: Callable[..., Any]
    on_retry: Callable[..., Any]


class Declare(Protocol):
    """What ``@app.task(…)`` with options decorates with."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


class DeclareBound(Protocol):
    """What ``@app.task(bind=True, …)`` decorates with: the first parameter is the task itself."""

    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...

    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> Task[P, R]: ...
