"""The composition root: an app holds its settings, plugins, tasks and components, and makes each on first use.

No globals: two apps live in one process without knowing of each other. The one register below serves ``shared_task``, whose
point is to be written before any app exists, and forks.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, Unpack, cast, overload
from zoneinfo import ZoneInfo

import attrs

from umbel import unique
from umbel.canvas.joining import Chords
from umbel.canvas.signature import Canvas, Signature
from umbel.client import Client
from umbel.codec import Codec
from umbel.control import Control
from umbel.declare import Declare, DeclareBound, DeclaredOptions
from umbel.errors import NotSupported, SettingsError, UmbelError
from umbel.gateway import Gateway, LocalGateway
from umbel.locks import Keeper, Lock
from umbel.model import TaskOptions
from umbel.plugins.loader import importing
from umbel.plugins.manager import PluginManager
from umbel.ports.clock import Clock, SystemClock
from umbel.registry import Registry
from umbel.result import AsyncResult
from umbel.routing import effective_options, queue_specs
from umbel.runtime import LoopThread
from umbel.scheduling.schedules import Schedules
from umbel.shared import enrol, shared_task
from umbel.task import AsyncTask, CallOptions, Request, Task

if TYPE_CHECKING:
    from umbel.ports.result_store import ResultStore
    from umbel.ports.transport import Transport
    from umbel.settings.schema import Settings
    from umbel.settings.sources import Loaded
    from umbel.worker.worker import Worker

P = ParamSpec("P")
R = TypeVar("R")

Middleware = Callable[[Callable[[Request], Any], Request], Any]
"""``(call_next, request) -> value``: wraps every task's call where it runs."""

MAIN_MODULES = ("__main__", "__umbel_main__")
"""Names of a script's module: run by the user, and run again in a child."""


class Umbel:
    """An application: ``app = Umbel("shop")``. Cheap to make; nothing is read or connected before first use."""

    def __init__(
        self,
        name: str = "main",
        *,
        broker: str | None = None,
        results: str | None = None,
        settings: Mapping[str, Any] | None = None,
        plugins: Sequence[object] = (),
        middleware: Sequence[Middleware] = (),
        clock: Clock | None = None,
    ) -> None:
        """``settings``: as in ``umbel.toml``, nested or with dotted keys. ``plugins``: objects with hook implementations."""
        code: dict[str, Any] = dict(settings or {})
        if broker is not None:
            code["broker.url"] = broker
        if results is not None:
            code["results.url"] = results
        self.name = name
        self.tasks = Registry()
        self.schedules = Schedules(self)
        self.schedule = self.schedules.declare
        self.clock: Clock = clock or SystemClock()
        self.middleware = list(middleware)
        self.chords: Chords | None = None
        """Who keeps the account of chords that peers have sent; a plugin puts it here in ``umbel_configure``."""
        self.reference: str | None = None
        """``module:attribute`` under which another process finds this app; see ``umbel.finding``."""
        self._sources: dict[str, Any] = {"code": code, "command_line": {}, "file": None}
        self._extra_plugins = tuple(plugins)
        self._lock = threading.RLock()
        self._loaded: Loaded | None = None
        self._plugins: PluginManager | None = None
        self._codec: Codec | None = None
        self._result_codec: Codec | None = None
        self._client: Client | None = None
        self._gateway: Gateway | None = None
        self._runtime: LoopThread | None = None
        self._lock_keeper: Keeper | None = None
        enrol(self)

    def __repr__(self) -> str:
        return f"<Umbel {self.name}>"

    # --- settings -------------------------------------------------------------------------------

    def configure(self, *, file: Path | str | None = None, command_line: Mapping[str, Any] | None = None) -> None:
        """Name the settings file and give settings that override all others. Only before first use."""
        with self._lock:
            if self._loaded is not None:
                raise UmbelError(f"app {self.name!r} has read its settings already; configure it before first use")
            if file is not None:
                self._sources["file"] = file
            self._sources["command_line"] = {**self._sources["command_line"], **(command_line or {})}

    @property
    def loaded(self) -> Loaded:
        """The settings, and where each came from. Raises ``SettingsError`` with every problem at once."""
        if (loaded := self._loaded) is not None:
            return loaded
        with self._lock:
            if self._loaded is None:
                with importing():
                    from umbel.settings.sources import load  # reads TOML and brings cattrs: not at import

                    self._loaded = load(**self._sources)
            return self._loaded

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self.loaded.settings

    @property
    def timezone(self) -> ZoneInfo:
        """The zone in which times without an offset are read."""
        return ZoneInfo(self.settings.timezone)

    def options_of(self, name: str, declared: TaskOptions) -> TaskOptions:
        """``declared`` after the settings had their say."""
        return effective_options(name, declared, self.settings.tasks)

    # --- components, each made on first use -----------------------------------------------------

    @property
    def plugins(self) -> PluginManager:
        """The app's plugins: those it was given, those its settings name, and whatever its components are."""
        with self._lock:
            if self._plugins is None:
                chosen = self.settings.plugins
                manager = PluginManager(disabled=chosen.disable, options=chosen.options, lock=self._lock)
                for plugin in self._extra_plugins:
                    manager.register(plugin)
                manager.load_hooks(chosen.hooks)
                self._plugins = manager  # which those that configure may ask for
                try:
                    manager.configure(self)
                except BaseException:
                    self._plugins = None
                    raise
            return self._plugins

    @property
    def codec(self) -> Codec:
        """For message bodies."""
        if (codec := self._codec) is not None:
            return codec
        with self._lock:
            if self._codec is None:
                self._codec = Codec(self.plugins, self.settings.codec)
            return self._codec

    @property
    def result_codec(self) -> Codec:
        """For result documents."""
        if (result_codec := self._result_codec) is not None:
            return result_codec
        with self._lock:
            if self._result_codec is None:
                name = self.settings.results.serializer
                read = self.settings.results.accept_compression
                chosen = attrs.evolve(
                    self.settings.codec, serializer=name, accept=(name,), compression=None, accept_compression=read
                )
                named = "[results] serializer", "[results] accept_compression"
                self._result_codec = Codec(self.plugins, chosen, named=named)
            return self._result_codec

    @property
    def client(self) -> Client:
        """Builds and sends messages."""
        if (client := self._client) is not None:
            return client
        with self._lock:
            if self._client is None:
                self._client = Client(self)
            return self._client

    @property
    def runtime(self) -> LoopThread:
        """The process's I/O loop."""
        with self._lock:
            if self._runtime is None:
                self._runtime = LoopThread()
            return self._runtime

    @property
    def gateway(self) -> Gateway:
        """The way to the broker and the result store from this process."""
        if (gateway := self._gateway) is not None:
            return gateway
        with self._lock:
            if self._gateway is None:
                store = self.make_result_store if self.settings.results.url else None
                queues = queue_specs(self.settings.queues)
                self._gateway = LocalGateway(
                    self.runtime, self.make_transport, store, queues, self.schedules.make_store
                )
            return self._gateway

    @property
    def control(self) -> Control:
        """Tells the workers of this app which tasks not to run."""
        return Control(self)

    def use_gateway(self, gateway: Gateway) -> None:
        """Send through ``gateway`` from now on: how a worker's child is tied to its parent."""
        self._gateway = gateway

    def make_transport(self) -> Transport:
        """A new transport as the settings want it. Raises ``PluginError``, ``SettingsError``, ``NotSupported``."""
        broker = self.settings.broker
        transport = self.plugins.make_transport(broker.url, broker.options, self.clock)
        bound = next((name for name, queue in self.settings.queues.items() if queue.exchange), None)
        if bound is not None and not transport.capabilities.exchanges:
            raise NotSupported(
                f"[queues.{bound}] exchange = {self.settings.queues[bound].exchange!r}, and the broker of [broker] url has no "
                "exchanges: take the setting away, or take a broker that has them (amqp://)"
            )
        return transport

    def make_result_store(self) -> ResultStore:
        """A new result store as the settings want it. Raises ``PluginError``, ``SettingsError``."""
        results = self.settings.results
        if not results.url:
            raise SettingsError(['there is no result store: [results] url is "disabled"'])
        store = self.plugins.make_result_store(results.url, results.options, self.clock)
        if results.track == "submit" and store.reply_to is not None:
            raise SettingsError(
                [
                    '[results] track = "submit" needs a store that keeps records for all, and that of [results] url sends each '
                    'to who asked: set track = "start", or take redis:// or sqlite:///'
                ]
            )
        return store

    def close(self) -> None:
        """Close connections and end the I/O loop. The app can be used again; it then connects anew."""
        with self._lock:
            gateway, self._gateway, self._client, self._runtime = self._gateway, None, None, None
            keeper, self._lock_keeper = self._lock_keeper, None
        if keeper is not None:
            keeper.close()
        if isinstance(gateway, LocalGateway):
            gateway.close()

    def __enter__(self) -> Umbel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def overridden(
        self, settings: Mapping[str, Any], *, clock: Clock, plugins: Sequence[object] = ()
    ) -> Iterator[None]:
        """Other settings, another clock and more plugins while the block lasts: how a test puts any app in memory.

        ``settings`` has dotted keys and wins over every source. What the app had made is put aside and in force again
        afterwards; what it makes meanwhile is closed. Not thread-safe: nobody else may use the app at either end.
        """
        before = dict(vars(self))
        self._loaded = self._plugins = self._codec = self._result_codec = None
        self._client = self._gateway = self._runtime = None
        self._sources = {**self._sources, "command_line": {**self._sources["command_line"], **settings}}
        self._extra_plugins, self.clock = (*self._extra_plugins, *plugins), clock
        self._forget_options()
        try:
            yield
        finally:
            self.close()
            vars(self).update(before)
            self._forget_options()

    def _forget_options(self) -> None:
        for task in self.tasks.values():
            task.forget_options()

    def after_fork(self) -> None:
        """Called in the child of a fork."""
        # The child of a fork shares its parent's sockets and files but none of its threads: leave them, start afresh.
        self._lock = threading.RLock()
        if self._plugins is not None:
            self._plugins.lock = self._lock
        if isinstance(self._gateway, LocalGateway):
            self._gateway = None
        self._client = self._runtime = self._lock_keeper = None

    # --- tasks ----------------------------------------------------------------------------------

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...

    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...

    @overload
    def task(
        self,
        /,
        *,
        bind: Literal[False] = False,
        name: str | None = None,
        base: type[Task[..., Any]] | None = None,
        **options: Unpack[DeclaredOptions],
    ) -> Declare: ...

    @overload
    def task(
        self,
        /,
        *,
        bind: Literal[True],
        name: str | None = None,
        base: type[Task[..., Any]] | None = None,
        **options: Unpack[DeclaredOptions],
    ) -> DeclareBound: ...

    def task(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        bind: bool = False,
        name: str | None = None,
        base: type[Task[..., Any]] | None = None,
        **options: Any,
    ) -> Any:
        """Make a function a task: ``@app.task`` or ``@app.task(queue="mail", max_retries=5, …)``.

        ``bind=True`` gives the function its task as first argument (``self.request``, ``self.retry``). An ``async def``
        function runs on an event loop where the task runs. The name is ``module.function`` unless given. Raises
        ``TypeError`` for an option that does not exist.
        """

        handlers: dict[str, Callable[..., Any]] = {
            handler: options.pop(handler) for handler in ("on_success", "on_failure", "on_retry") if handler in options
        }
        known = [a.name for a in attrs.fields(TaskOptions)]
        if unknown := options.keys() - set(known):
            raise TypeError(
                f"a task has no option {sorted(unknown)}; its options are: name, bind, base, {', '.join(known)}"
            )

        def declare(function: Callable[..., Any]) -> Task[..., Any]:
            task = (base or (AsyncTask if inspect.iscoroutinefunction(function) else Task))(
                self,
                function,
                name=name or self._name_of(function),
                bind=bind,
                options=TaskOptions(**options),
                handlers=handlers,
            )
            self.tasks.add(task)
            return task

        return declare if function is None else declare(function)

    def _name_of(self, function: Callable[..., Any]) -> str:
        module = function.__module__
        return f"{self.name if module in MAIN_MODULES else module}.{function.__qualname__.replace('<locals>.', '')}"

    def send_task(
        self,
        name: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncResult[Any]:
        """Send a task by name, whether or not its code is here. Raises as ``Task.delay``."""
        if name in self.tasks:
            return self.tasks[name].apply_async(args, kwargs, **options)
        timeout = options.pop("timeout", None)
        effective = self.options_of(name, TaskOptions())
        options.setdefault(
            "ignore_result", True if effective.ignore_result else None
        )  # None: as the worker's task says
        plan = None
        if unique.wanted(effective, options):
            plan = unique.plan(name, args, kwargs or {}, effective, cast("dict[str, Any]", options))
        message = self.client.message(name, args, kwargs or {}, effective, **options)
        if plan is not None:
            return unique.handle(self, unique.send(self, plan, message, timeout))
        self.client.send([message], timeout)
        return AsyncResult(message.id, self)

    def lock(self, name: str, *, lease: float | None = None, timeout: float | None = None) -> Lock:
        """A lock that excludes all others of its name in the fleet: ``with app.lock("report"):``, or ``async with``.

        ``lease``: seconds after which it is free if its holder is gone; None: ``[unique] lock_lease``. ``timeout``: seconds to
        wait for it; None: for ever.
        """
        return Lock(self, name, lease=self.settings.unique.lock_lease if lease is None else lease, timeout=timeout)

    @property
    def lock_keeper(self) -> Keeper:
        """Renews the locks that this process holds."""
        with self._lock:
            if self._lock_keeper is None:
                self._lock_keeper = Keeper(self)
            return self._lock_keeper

    def signature(self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Signature:
        """A call of a task by name, as a value."""
        return Signature(task=name, args=tuple(args), kwargs=kwargs or {}, app=self)

    def send_canvas(self, canvas: Canvas[Any], options: Mapping[str, Any]) -> Any:
        """Send a chain, a group or a chord; return its handle. Raises as ``Canvas.apply_async``."""
        from umbel.canvas.results import send  # whoever composes nothing needs nothing of it

        return send(self, canvas, options)

    def result(self, task_id: str) -> AsyncResult[Any]:
        """A handle on a task that was sent before, by id."""
        return AsyncResult(task_id, self)

    def load_tasks(self) -> None:
        """Import the modules that the settings' ``imports`` name. Raises ``UmbelError`` naming the module."""
        from umbel.finding import import_module_or_explain  # above this layer in one direction only: it finds apps

        for module in self.settings.imports:
            import_module_or_explain(module, "imports")

    # --- running --------------------------------------------------------------------------------

    def worker(self) -> Worker:
        """A worker of this app, not yet started."""
        from umbel.worker.worker import Worker

        return Worker(self)


__all__ = ["AsyncResult", "Middleware", "Umbel", "shared_task"]
