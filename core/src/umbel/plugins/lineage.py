"""How a setting came to a component: which hook was asked, who answered, and whose that is. ``umbel plugins why``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

from attrs import evolve, frozen

from umbel.errors import UmbelError
from umbel.markers import PROJECT
from umbel.plugins import loader
from umbel.plugins.kinds import COMPRESSOR, HOOK, POOL, RESULT_STORE, SCHEDULER, SERIALIZER, TRANSPORT, Kind, Source
from umbel.plugins.manager import LOADER, PluginManager

NAMING: Final[Mapping[str, Kind[Any]]] = {
    "broker.url": TRANSPORT,
    "results.url": RESULT_STORE,
    "results.serializer": SERIALIZER,
    "codec.serializer": SERIALIZER,
    "codec.accept": SERIALIZER,
    "codec.compression": COMPRESSOR,
    "codec.accept_compression": COMPRESSOR,
    "results.accept_compression": COMPRESSOR,
    "scheduler.url": SCHEDULER,
    "worker.pool": POOL,
    "plugins.hooks": HOOK,
    "tasks.*.serializer": SERIALIZER,
    "tasks.*.compression": COMPRESSOR,
}
"""The settings that name plugins, and of which kind."""


def kind_named_by(key: str) -> Kind[Any] | None:
    """The kind of plugin that the setting ``key`` (dotted) names; None: it names none."""
    return next((kind for pattern, kind in NAMING.items() if fnmatchcase(key, pattern)), None)


@frozen(kw_only=True)
class Lineage:
    """From one name in the settings to one component."""

    kind: str
    name: str | None
    """The plugin's name in what the setting says; None: it says none."""
    hook: str
    """The factory hook that was asked, or the entry-point group of listeners."""
    answered_by: str | None = None
    """The plugin that answered: ``entry-points`` where no plugin of the application did; None: it failed or nobody did."""
    wrapped_by: Sequence[str] = ()
    """Plugins that wrap the factory, the outermost first."""
    distribution: str | None = None
    version: str | None = None
    target: str | None = None
    """``module:object``, as the entry point or the dotted path has it."""
    component: str | None = None
    """The class of what came out."""
    listens_to: Sequence[str] = ()
    """Of a listener: the hooks that it implements."""
    reason: str = ""
    """Why there is no component, in one sentence."""

    def of(self, source: Source) -> Lineage:
        """The same, coming from ``source``."""
        return evolve(self, distribution=source.distribution, version=source.version, target=source.target)


def trace(plugins: PluginManager, kind: Kind[Any], reference: str, arguments: Mapping[str, Any]) -> Lineage:
    """Ask for a component as the kernel does, and note who answers. Makes the component; no I/O.

    ``arguments``: those of the factory hook beside the name or URL. What fails is told in ``reason``, not raised.
    """
    name = kind.plugin_name(reference)
    known = Lineage(kind=kind.name, name=name, hook=kind.group if kind is HOOK else kind.hook)
    try:
        return (
            _listener(plugins, known, reference)
            if kind is HOOK
            else _driver(plugins, kind, known, reference, arguments)
        )
    except UmbelError as error:
        return evolve(known, reason=str(error))


def _driver(
    plugins: PluginManager, kind: Kind[Any], known: Lineage, reference: str, arguments: Mapping[str, Any]
) -> Lineage:
    options = plugins.options.get(known.name or "", {})
    given = {"url" if kind.by_url else "name": reference, "options": options, **arguments}
    factories = plugins.factories(kind.hook)  # before anything is made: what is made may take part itself
    wrappers = [factory.plugin for factory in factories if inspect.isgeneratorfunction(factory.function)]
    cls = type(getattr(plugins, f"make_{kind.name}")(reference, **arguments))
    answered_by = next(
        factory.plugin
        for factory in factories
        if factory.plugin not in wrappers and factory.function(*[given[word] for word in factory.arguments]) is not None
    )
    if answered_by == LOADER and known.name is not None:
        _, source = loader.load_driver(kind, known.name)
    else:
        source = loader.source_of_class(kind, cls)
    component = f"{cls.__module__}.{cls.__qualname__}"
    return evolve(known.of(source), answered_by=answered_by, wrapped_by=tuple(wrappers), component=component)


def _listener(plugins: PluginManager, known: Lineage, name: str) -> Lineage:
    plugin = dict(plugins.registered()).get(name)
    if plugin is None:
        return evolve(known, reason=f"hook {name!r} takes no part: [plugins] disable has it")
    source = next(
        (loader.source_of(HOOK, entry_point) for entry_point in loader.installed(HOOK) if entry_point.name == name),
        None,
    )
    cls = plugin if inspect.ismodule(plugin) else type(plugin)
    component = cls.__name__ if inspect.ismodule(cls) else f"{cls.__module__}.{cls.__qualname__}"
    known = known.of(source or Source(kind=HOOK, name=name, target=name))
    return evolve(known, answered_by=name, component=component, listens_to=tuple(_hooks(plugin)))


def _hooks(plugin: object) -> Iterator[str]:
    for name in dir(plugin):
        if hasattr(getattr(plugin, name), f"{PROJECT}_impl"):  # what pluggy's marker leaves
            yield name
