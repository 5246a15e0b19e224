"""Tasks written before any app exists, and the one register of the apps that live in this process.

``shared_task`` is the only thing here that is global, because that is its point; forks and children in the same process need
the register as well.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, Unpack, overload

from umbel.declare import Declare, DeclareBound, DeclaredOptions
from umbel.errors import UmbelError
from umbel.task import AsyncTask, Task, current_request

if TYPE_CHECKING:
    from umbel.app import Umbel

P = ParamSpec("P")
R = TypeVar("R")

live_apps: weakref.WeakSet[Umbel] = weakref.WeakSet()
"""Every app of this process."""

shared_tasks: list[SharedTask] = []
"""Every shared task that has been defined."""


def enrol(app: Umbel) -> None:
    """A new app: it has every shared task, and hears of forks."""
    live_apps.add(app)
    for shared in shared_tasks:
        shared.declare(app)


def live_app(token: int) -> Umbel | None:
    """The app of this process with that ``id``; None in another process."""
    return next((app for app in list(live_apps) if id(app) == token), None)


class SharedTask:
    """A task of a library, written before any app: every app has it; used directly, it is the app's in force."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._function = function
        self._options = options
        # Names, not tasks: a task holds its app, and would keep it alive for ever.
        self._names: weakref.WeakKeyDictionary[Umbel, str] = weakref.WeakKeyDictionary()
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    def declare(self, app: Umbel) -> None:
        """Register the task in ``app``."""
        make: Any = app.task(**self._options)
        self._names[app] = make(self._function).name

    def _task(self) -> Task[..., Any]:
        if (request := current_request()) is not None and (app := request.task.app) in self._names:
            return app.tasks[self._names[app]]
        apps = list(self._names)
        if len(apps) != 1:
            raise UmbelError(
                f"shared task {self.__name__} belongs to {len(apps)} apps; "
                + ("make an app first" if not apps else "use app.tasks[name] to say which")
            )
        return apps[0].tasks[self._names[apps[0]]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs) if not self._options.get("bind") else self._task()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task(), name)


@overload
def shared_task(function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...


@overload
def shared_task(function: Callable[P, R], /) -> Task[P, R]: ...


@overload
def shared_task(
    *,
    bind: Literal[False] = False,
    name: str | None = None,
    base: type[Task[..., Any]] | None = None,
    **options: Unpack[DeclaredOptions],
) -> Declare: ...


@overload
def shared_task(
    *,
    bind: Literal[True],
    name: str | None = None,
    base: type[Task[..., Any]] | None = None,
    **options: Unpack[DeclaredOptions],
) -> DeclareBound: ...


def shared_task(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """``@app.task`` for libraries that have no app: the task is registered in every app, made before or after."""

    def declare(function: Callable[..., Any]) -> SharedTask:
        shared = SharedTask(function, options)
        shared_tasks.append(shared)
        for app in list(live_apps):
            shared.declare(app)
        return shared

    return declare if function is None else declare(function)


def _after_fork() -> None:
    for app in list(live_apps):
        app.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
