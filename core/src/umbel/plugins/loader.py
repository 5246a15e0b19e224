"""What a configured name means: an entry point, or a dotted path. A plugin like any other, that answers last.

``stevedore`` and ``importlib.metadata`` are imported inside functions: an application whose drivers are given in code
or as dotted paths never pays for them.
"""

from __future__ import annotations

import difflib
import functools
import os
import pkgutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlsplit

from umbel.errors import PluginBroken, PluginConflict, PluginNotFound, SettingsError, UmbelError
from umbel.markers import hookimpl
from umbel.plugins.kinds import (
    COMMAND,
    COMPRESSOR,
    HOOK,
    KINDS,
    POOL,
    RESULT_STORE,
    SCHEDULER,
    SERIALIZER,
    TRANSPORT,
    Kind,
    P,
    Source,
    package_of,
    refusal,
)

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from stevedore.driver import DriverManager

    from umbel.ports.clock import Clock
    from umbel.ports.compressor import Compressor
    from umbel.ports.pool import Pool
    from umbel.ports.result_store import ResultStore
    from umbel.ports.scheduler import Scheduler
    from umbel.ports.serializer import Serializer
    from umbel.ports.transport import Transport

# What to offer by `pip install "umbel[…]"` where the bundle `umbel`, whose extras would tell, is not installed.
_FIRST_PARTY: Final = (
    *("amqp", "redis", "memory", "sqlite"),
    *("json", "pickle", "msgpack", "yaml"),
    *("zlib", "bzip2", "lzma", "brotli", "zstd"),
    *("prefork", "asyncio", "gevent", "eventlet", "threads", "solo"),
    "celery",
    *("health", "solar", "systemd"),
)


_PATIENCE: Final = 5.0
"""Seconds that a fork waits for an import of another thread; one that takes longer may be lost to the child."""
_importing = threading.RLock()


def importing() -> AbstractContextManager[object]:
    """Held around every import that is not made at the top of a module.

    The child of a fork has only the forking thread. A module that another thread was importing stays locked in it, and the
    child's own import of it would wait for ever; so no fork comes between the beginning and the end of such an import.
    """
    return _importing


_held = threading.local()


def _before_fork() -> None:
    _held.taken = _importing.acquire(timeout=_PATIENCE)


def _after_fork() -> None:
    if getattr(_held, "taken", False):
        _importing.release()
        _held.taken = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


# --- the factories -------------------------------------------------------------------------------


@hookimpl(trylast=True)
def umbel_make_transport(url: str, options: Mapping[str, Any], clock: Clock) -> Transport:
    return _make_by_url(TRANSPORT, url, options, clock)


@hookimpl(trylast=True)
def umbel_make_result_store(url: str, options: Mapping[str, Any], clock: Clock) -> ResultStore:
    return _make_by_url(RESULT_STORE, url, options, clock)


@hookimpl(trylast=True)
def umbel_make_scheduler(url: str, options: Mapping[str, Any], clock: Clock) -> Scheduler:
    return _make_by_url(SCHEDULER, url, options, clock)


@hookimpl(trylast=True)
def umbel_make_serializer(name: str, options: Mapping[str, Any]) -> Serializer:
    return construct(*load_driver(SERIALIZER, name), options=options)


@hookimpl(trylast=True)
def umbel_make_compressor(name: str, options: Mapping[str, Any]) -> Compressor:
    return construct(*load_driver(COMPRESSOR, name), options=options)


@hookimpl(trylast=True)
def umbel_make_pool(name: str, options: Mapping[str, Any]) -> Pool:
    return construct(*load_driver(POOL, name), options=options)


def _make_by_url(kind: Kind[P], url: str, options: Mapping[str, Any], clock: Clock) -> P:
    # The URL itself is in no message: it may hold a password.
    name = kind.plugin_name(url)
    if name is None:
        forms = 'a URL ("sqlite:///path"), a plugin\'s name ("memory"), or a dotted path ("package.module:Class")'
        raise SettingsError([f"{kind.setting} must be {forms}"])
    address, query = _split_query(kind, url)
    return construct(*load_driver(kind, name), address, options={**query, **options}, clock=clock)


def _split_query(kind: Kind[Any], url: str) -> tuple[str, dict[str, str]]:
    """A URL without its query, and the query: once read into options, it has no second reader."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise SettingsError([f"{kind.setting} is not a URL: {error}"]) from None
    query: dict[str, str] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key in query:
            raise SettingsError([f"{kind.setting} gives the option {key!r} twice"])
        query[key] = value
    return (url.partition("?")[0] if parts.query else url), query


def construct(
    cls: type[P], source: Source, *arguments: Any, options: Mapping[str, Any] | None = None, **more: Any
) -> P:
    """Make an instance of a plugin, its options structured; None where none are given.

    Raises ``SettingsError``, ``PluginError``.
    """
    if _table(source) and (takes := getattr(cls, "Options", None)) is not None:
        more["options"] = None
        if options:
            with importing():
                from umbel.settings.structure import structure_options

            more["options"] = structure_options(takes, options, where=_table(source))
    elif options:
        raise _no_options(source)
    try:
        return cls(*arguments, **more)
    except UmbelError:
        raise
    except Exception as error:
        raise source.failure(error) from error


# --- finding -------------------------------------------------------------------------------------


def installed(kind: Kind[Any]) -> Sequence[EntryPoint]:
    """The entry points of one kind in this environment, from one scan a process; each knows its distribution."""
    return _scan()[kind.group]


def forget_installed() -> None:
    """Scan anew when next asked: for tests, and for whoever installs while running."""
    _scan.cache_clear()


@functools.cache
def _scan() -> Mapping[str, Sequence[EntryPoint]]:
    # stevedore's own cache, on disk, misses changes for two minutes and forgets which distribution offers what.
    from importlib.metadata import entry_points

    found = entry_points()
    return {kind.group: tuple(found.select(group=kind.group)) for kind in KINDS}


def load_driver(kind: Kind[P], name: str) -> tuple[type[P], Source]:
    """Import the driver class of that name, and nothing else.

    Raises ``PluginNotFound``, ``PluginDependencyMissing``, ``PluginBroken``, ``PluginConflict``, ``PluginApiMismatch``.
    """
    driver, source = _load(kind, name, is_path=":" in name)
    if not isinstance(driver, type):
        raise source.refuse(PluginBroken, f"is broken: {source.target} is not a class")
    return driver, source


def load_hook(name: str, options: Mapping[str, Any] | None = None) -> object:
    """Import one plugin of the group ``umbel.hooks``, or what is at a dotted path; a class is called.

    A class with an attrs class ``Options`` is called with ``options=``: its instance, or None where the settings have no
    table for it. Raises as ``load_driver`` does, and ``SettingsError`` for options that are wrong or that nobody takes.
    """
    plugin, source = _load(HOOK, name, is_path=":" in name or "." in name)
    if isinstance(plugin, type):
        return construct(plugin, source, options=options)
    if options:
        raise _no_options(source)
    return plugin


def load_command(name: str) -> tuple[object, Source]:
    """Import one plugin of the group ``umbel.commands``. Raises as ``load_driver`` does."""
    return _load(COMMAND, name, is_path=False)


def _no_options(source: Source) -> SettingsError:
    return SettingsError([f"{_table(source)} is given, but {source} takes no options: take the table away"])


def _table(source: Source) -> str:
    """Where the settings have the options of a plugin; empty: nowhere."""
    name = source.name if source.name.replace("-", "_").isidentifier() else f'"{source.name}"'
    return (source.kind.options or "").replace("NAME", name)


def _load(kind: Kind[Any], name: str, *, is_path: bool) -> tuple[object, Source]:
    with importing():
        return _load_alone(kind, name, is_path=is_path)


def _load_alone(kind: Kind[Any], name: str, *, is_path: bool) -> tuple[object, Source]:
    source = Source(kind=kind, name=name, target=name) if is_path else source_of(kind, _find(kind, name))
    try:
        if is_path:
            # Without a colon, resolve_name would take an ImportError of the module for a missing attribute.
            plugin = pkgutil.resolve_name(name if ":" in name else f"{name}:")
        else:
            plugin = _drivers()(kind.group, name).extensions[0].plugin
    except (Exception, SystemExit) as error:
        raise source.failure(error) from error
    if refused := refusal(kind, plugin):
        raise source.refuse(*refused)
    return plugin, source


@functools.cache
def _drivers() -> type[DriverManager[Any]]:
    from stevedore.driver import DriverManager

    class Drivers(DriverManager[Any]):
        """stevedore over this process's one scan."""

        def list_entry_points(self) -> list[EntryPoint]:
            return list(_scan()[self.namespace])

    return Drivers


def _find(kind: Kind[Any], name: str) -> EntryPoint:
    found = [entry_point for entry_point in installed(kind) if entry_point.name == name]
    if not found:
        raise not_found(kind, name)
    if len(found) > 1:
        raise conflict(kind, found)
    return found[0]


def conflict(kind: Kind[Any], entry_points: Sequence[EntryPoint]) -> PluginConflict:
    """The error for several entry points of one name in one group."""
    sources = [source_of(kind, entry_point) for entry_point in entry_points]
    offers = " and by ".join(f"{source.distribution} {source.version}" for source in sources)
    return PluginConflict(f"{kind.title} {sources[0].name!r} is offered by {offers}: uninstall one ({kind.setting})")


def not_found(kind: Kind[Any], name: str) -> PluginNotFound:
    """The error for a name that no installed distribution offers: what was meant, and how to install it."""
    names = sorted({entry_point.name for entry_point in installed(kind)})
    others = {entry_point.name: other for other in KINDS for entry_point in installed(other) if other is not kind}
    ours = first_party() - others.keys()
    hints = []
    if name in others:
        hints.append(f"{name!r} is a {others[name].title}")
    elif name in ours:
        hints.append(f'pip install "umbel[{name}]"')
    elif near := difflib.get_close_matches(name, sorted({*names, *ours}), n=1):
        hints.append(f"did you mean {near[0]!r}?" + ("" if near[0] in names else f' pip install "umbel[{near[0]}]"'))
    if "." in name:
        hints.append('a class of your own is written "package.module:Class"')
    hints.append(f"installed: {', '.join(names) or 'none'}")
    return PluginNotFound(f"no {kind.title} {name!r} is installed ({kind.setting}); {'; '.join(hints)}")


def first_party() -> frozenset[str]:
    """Names that ``pip install "umbel[…]"`` knows."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        return frozenset(metadata("umbel").get_all("Provides-Extra") or ()) - {"all"}
    except PackageNotFoundError:
        return frozenset(_FIRST_PARTY)


def source_of(kind: Kind[Any], entry_point: EntryPoint, name: str | None = None, target: str | None = None) -> Source:
    """Where a plugin comes from that this entry point offers, or that lies in the same package."""
    dist = entry_point.dist
    return Source(
        kind=kind,
        name=name or entry_point.name,
        target=target or entry_point.value,
        distribution=dist.name if dist else None,
        version=dist.version if dist else None,
    )


def source_of_class(kind: Kind[Any], cls: type[Any], name: str | None = None) -> Source:
    """Where a class comes from that was not found here: a distribution whose plugins share its package, if any does."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    for entry_point in (entry_point for other in KINDS for entry_point in installed(other)):
        if package_of(entry_point.value) == package_of(target):
            return source_of(kind, entry_point, name or target, target)
    return Source(kind=kind, name=name or target, target=target)
