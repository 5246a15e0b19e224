"""Who takes part: the plugins of one application, the factories that make its drivers, and its listeners."""

from __future__ import annotations

import difflib
import inspect
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import pluggy
from attrs import frozen

from umbel import hookspecs
from umbel.errors import PluginBroken, PluginError, PluginNotFound, SettingsError
from umbel.markers import PROJECT
from umbel.plugins import loader
from umbel.plugins.kinds import COMPRESSOR, POOL, RESULT_STORE, SCHEDULER, SERIALIZER, TRANSPORT, Kind, P, refusal
from umbel.ports.clock import Clock, SystemClock

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.ports.compressor import Compressor
    from umbel.ports.pool import Pool
    from umbel.ports.result_store import ResultStore
    from umbel.ports.scheduler import Scheduler
    from umbel.ports.serializer import Serializer
    from umbel.ports.timetable import Timetable
    from umbel.ports.transport import Transport

LOADER: Final = "entry-points"
"""The name of the loader among the plugins: disable it, and only hooks and objects given in code make drivers."""

_PREFIX: Final = f"{PROJECT}_"
_FACTORIES: Final = f"{PROJECT}_make_"
_CONTRIBUTIONS: Final = (f"{PROJECT}_add_", f"{PROJECT}_configure")

_log = logging.getLogger("umbel.plugins")


@frozen
class Listener:
    """One implementation of one hook."""

    plugin: str
    """Name of the plugin that it is of."""
    function: Callable[..., Any]
    arguments: tuple[str, ...]
    """The arguments that it asks for, in its order."""


class Observer:
    """The listeners of one hook, frozen. False when nobody listens, so that an unheard call costs one truth test.

    Call it with every argument of the hook's specification. A listener that raises is logged, and neither the caller
    nor another listener notices.
    """

    __slots__ = ("_listeners", "name")

    def __init__(self, name: str, listeners: Sequence[Listener]) -> None:
        self.name = name
        self._listeners = tuple(listeners)

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def __call__(self, **given: Any) -> None:
        for listener in self._listeners:
            try:
                listener.function(*[given[name] for name in listener.arguments])
            except Exception:
                _log.exception("plugin %r failed in %s", listener.plugin, self.name)


class _Handle:
    """A plugin as pluggy holds it: compared by identity, and with no attributes but those named like hooks.

    pluggy compares plugins with ``==``, which a driver may define by value, and looks at every attribute.
    """

    def __init__(self, plugin: object) -> None:
        self.plugin = plugin
        vars(self).update((name, getattr(plugin, name)) for name in dir(plugin) if name.startswith(_PREFIX))


class PluginManager:
    """The plugins of one application. Thread-safe: plugins are registered and components made one at a time."""

    def __init__(
        self,
        *,
        disabled: Collection[str] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        """Register the loader and nothing else.

        ``disabled``: names that are never registered, loaded or made. ``options``: the tables ``[plugins.options.NAME]`` of
        listeners, serializers and compressors. ``lock``: reentrant; an application gives its own, since plugins may ask it
        for something while they are made.
        """
        self.lock: AbstractContextManager[Any] = threading.RLock() if lock is None else lock
        self.options = options or {}
        self._pluggy = pluggy.PluginManager(PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        for name in disabled:
            self._pluggy.set_blocked(name)
        self.register(loader, LOADER)

    # --- registering ---

    def register(self, plugin: object, name: str | None = None) -> None:
        """Let a plugin, an instance or a module, take part; the later one is called first.

        Raises ``PluginBroken``, with nothing registered, for a hook implementation that is of no hook (unless it says
        ``optionalhook``), asks for an argument that its hook does not have, is a coroutine function, or wraps a hook
        that is not a factory; ``PluginError`` if the plugin or the name is registered already.
        """
        if isinstance(plugin, type):
            raise PluginError(f"plugin {plugin.__qualname__} is a class: register an instance of it")
        with self.lock:
            if self._name_of(plugin) is not None:
                raise PluginError(f"plugin {plugin!r} is registered already, as {self._name_of(plugin)!r}")
            if name is None:
                name = self._free_name(getattr(plugin, "__name__", type(plugin).__qualname__))
            elif self._pluggy.has_plugin(name):
                raise PluginError(f"a plugin named {name!r} is registered already: register the other by another name")
            self._register(plugin, name)

    def unregister(self, plugin: object) -> None:
        """Let a plugin take part no more. Observers frozen before still call it. Raises ``PluginError``."""
        with self.lock:
            name = self._name_of(plugin)
            if name is None:
                raise PluginError(f"plugin {plugin!r} is not registered")
            self._pluggy.unregister(name=name)

    def registered(self) -> list[tuple[str, object]]:
        """Names and plugins, drivers included, in the order of registration."""
        return [(name, h.plugin) for name, h in self._pluggy.list_name_plugin() if isinstance(h, _Handle)]

    def load_hooks(self, names: Sequence[str]) -> None:
        """Import and register listeners: entry points of ``umbel.hooks`` or dotted paths; the first is called first.

        A path is ``package.module`` or ``package.module:object``; a class is called without arguments. A name that is
        disabled, or that a plugin given in code bears already, is not imported. Raises ``PluginError``, ``SettingsError``;
        what cannot be imported is found out before anything is registered.
        """
        with self.lock:
            wanted = [n for n in dict.fromkeys(names) if not (self._pluggy.is_blocked(n) or self._pluggy.has_plugin(n))]
            for name, plugin in reversed([(name, loader.load_hook(name, self.options.get(name))) for name in wanted]):
                self.register(plugin, name)

    def _register(self, plugin: object, name: str) -> None:
        handle = _Handle(plugin)
        try:
            if self._pluggy.register(handle, name) is None:  # disabled
                return
        except pluggy.PluginValidationError as error:
            raise PluginBroken(f"plugin {name!r} is broken: {error}") from error
        if fault := self._fault(handle):
            self._pluggy.unregister(name=name)
            raise PluginBroken(f"plugin {name!r} is broken: {fault}")

    def _fault(self, handle: _Handle) -> str | None:
        """What pluggy lets pass and we do not."""
        for caller in self._pluggy.get_hookcallers(handle) or ():
            for impl in caller.get_hookimpls():
                if impl.plugin is not handle:
                    continue
                if not caller.has_spec():
                    if not impl.optionalhook:
                        return f"there is no hook {caller.name!r}{self._nearest(caller.name)}"
                elif inspect.iscoroutinefunction(impl.function):
                    return f"{caller.name} is a coroutine function, and hooks are called synchronously"
                elif (impl.wrapper or impl.hookwrapper) and not caller.name.startswith(_FACTORIES):
                    return f"{caller.name} cannot be wrapped, only the {_FACTORIES}* hooks can: use middleware"
        return None

    def _name_of(self, plugin: object) -> str | None:
        return next((name for name, registered in self.registered() if registered is plugin), None)

    def _free_name(self, name: str) -> str:
        number, free = 1, name
        while self._pluggy.has_plugin(free):
            number += 1
            free = f"{name}#{number}"
        return free

    # --- factories ---

    def make_transport(
        self,
        url: str | Transport | type[Transport],
        options: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
    ) -> Transport:
        """Make the transport for a URL, a plugin's name or a ``package.module:Class``; a class given in code is
        constructed with an empty URL, and an object is returned as it is.

        The first factory hook that answers wins. What it returns is checked, and registered as a plugin, so that a
        driver may implement hooks. No I/O.

        Raises ``PluginNotFound``, ``PluginDependencyMissing``, ``PluginBroken``, ``PluginConflict``,
        ``PluginApiMismatch``, and ``SettingsError`` for a malformed URL or wrong options.
        """
        return self._make(TRANSPORT, url, _url_arguments(options, clock))

    def make_result_store(
        self,
        url: str | ResultStore | type[ResultStore],
        options: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
    ) -> ResultStore:
        """Make the result store for a URL. Otherwise as ``make_transport``."""
        return self._make(RESULT_STORE, url, _url_arguments(options, clock))

    def make_scheduler(
        self,
        url: str | Scheduler | type[Scheduler],
        options: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
    ) -> Scheduler:
        """Make the scheduler store for a URL. Otherwise as ``make_transport``."""
        return self._make(SCHEDULER, url, _url_arguments(options, clock))

    def make_timetable(self, schedule: Mapping[str, Any]) -> Timetable | None:
        """The timetable of a schedule; None where no plugin makes one of it. Raises what the plugin raises."""
        made: Timetable | None = self._pluggy.hook.umbel_make_timetable(schedule=schedule)
        return made

    def make_serializer(self, name: str | Serializer | type[Serializer]) -> Serializer:
        """Make the serializer of that name. Otherwise as ``make_transport``."""
        return self._make(SERIALIZER, name, self._own_options(name))

    def make_compressor(self, name: str | Compressor | type[Compressor]) -> Compressor:
        """Make the compressor of that name. Otherwise as ``make_transport``."""
        return self._make(COMPRESSOR, name, self._own_options(name))

    def make_pool(self, name: str | Pool | type[Pool], options: Mapping[str, Any] | None = None) -> Pool:
        """Make the pool of that name. Otherwise as ``make_transport``."""
        return self._make(POOL, name, {"options": options or {}})

    def _own_options(self, wanted: object) -> dict[str, Any]:
        return {"options": self.options.get(wanted, {}) if isinstance(wanted, str) else {}}

    def _make(self, kind: Kind[P], wanted: str | P | type[P], arguments: Mapping[str, Any]) -> P:
        with self.lock:
            return self._make_alone(kind, wanted, arguments)

    def _make_alone(self, kind: Kind[P], wanted: str | P | type[P], arguments: Mapping[str, Any]) -> P:
        name = kind.plugin_name(wanted) if isinstance(wanted, str) else None
        component: P
        if isinstance(wanted, str):
            component = self._ask(kind, wanted, name, arguments)
        elif isinstance(wanted, type):
            self._check(kind, wanted, None)
            source = loader.source_of_class(kind, wanted)
            component = loader.construct(wanted, source, *([""] if kind.by_url else []), **arguments)
        else:
            component = wanted
        self._check(kind, component, name)
        if self._name_of(component) is None:
            self._register(component, self._free_name(f"{kind.name}:{name or type(component).__qualname__}"))
        return component

    def _ask(self, kind: Kind[Any], wanted: str, name: str | None, arguments: Mapping[str, Any]) -> Any:
        for plugin in (name, f"{kind.name}:{name}"):
            if plugin is not None and self._pluggy.is_blocked(plugin):
                raise PluginError(
                    f"{kind.title} {name!r} ({kind.setting}) is disabled: [plugins] disable has {plugin!r}"
                )
        reference = {"url" if kind.by_url else "name": wanted}
        component = getattr(self._pluggy.hook, kind.hook)(**reference, **arguments)
        if component is None:
            reason = f"every {kind.hook} declined, and [plugins] disable has {LOADER!r}"
            raise PluginNotFound(f"no plugin makes the {kind.title} {name!r} ({kind.setting}): {reason}")
        return component

    def _check(self, kind: Kind[Any], plugin: object, name: str | None) -> None:
        if refused := refusal(kind, plugin):
            cls = plugin if isinstance(plugin, type) else type(plugin)
            raise loader.source_of_class(kind, cls, name).refuse(*refused)

    # --- calling ---

    def factories(self, hook_name: str) -> list[Listener]:
        """Who makes components by that ``umbel_make_*`` hook, in the order of asking, wrappers included."""
        return self._listeners(hook_name)

    def observer(self, hook_name: str) -> Observer:
        """The listeners of an observing hook as they are now, in pluggy's order. Raises ``PluginError``."""
        if hook_name.startswith((_FACTORIES, *_CONTRIBUTIONS)):
            raise PluginError(f"{hook_name} is not a hook to observe")
        return Observer(hook_name, self._listeners(hook_name))

    def contributions(self, hook_name: str, **given: Any) -> list[Any]:
        """What all plugins return from an ``umbel_add_*`` hook, as one list, in pluggy's order.

        Raises ``PluginBroken`` naming the plugin that raised, or that returned something other than a sequence or None.
        """
        return [one for _, one in self.contributed(hook_name, **given)]

    def contributed(self, hook_name: str, **given: Any) -> list[tuple[str, Any]]:
        """``contributions``, each with the name of the plugin that it is of. Raises as that does."""
        together: list[tuple[str, Any]] = []
        for plugin, contributed in self._contribute(hook_name, given):
            if isinstance(contributed, str) or not isinstance(contributed, Sequence | None):
                raise PluginBroken(f"plugin {plugin!r} returned {contributed!r} from {hook_name}, not a list")
            together.extend((plugin, one) for one in contributed or ())
        return together

    def configure(self, app: Umbel) -> None:
        """Call every ``umbel_configure``. Raises a plugin's ``SettingsError``, or ``PluginBroken`` naming it."""
        for _ in self._contribute("umbel_configure", {"app": app}):
            pass

    def _contribute(self, hook_name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        if not hook_name.startswith(_CONTRIBUTIONS):
            raise PluginError(f"{hook_name} is not a hook to contribute by")
        for listener in self._listeners(hook_name):
            try:
                contributed = listener.function(*[given[name] for name in listener.arguments])
            except SettingsError:
                raise
            except Exception as error:
                reason = f"plugin {listener.plugin!r} failed in {hook_name}: {type(error).__name__}: {error}"
                raise PluginBroken(reason) from error
            yield listener.plugin, contributed

    def _listeners(self, hook_name: str) -> list[Listener]:
        caller = getattr(self._pluggy.hook, hook_name, None)
        if caller is None or not caller.has_spec():
            raise PluginError(f"there is no hook {hook_name!r}{self._nearest(hook_name)}")
        return [Listener(i.plugin_name, i.function, i.argnames) for i in reversed(caller.get_hookimpls())]

    def _nearest(self, hook_name: str) -> str:
        near = difflib.get_close_matches(hook_name, [n for n in dir(hookspecs) if n.startswith(_PREFIX)], n=1)
        return f": did you mean {near[0]!r}?" if near else ""


def _url_arguments(options: Mapping[str, Any] | None, clock: Clock | None) -> dict[str, Any]:
    return {"options": options or {}, "clock": SystemClock() if clock is None else clock}
