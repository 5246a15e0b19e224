"""What is installed, and whether it is any good: ``umbel plugins`` and ``umbel plugins check NAME``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Final, Literal

from attrs import NOTHING, asdict, evolve, fields, frozen, has

from umbel.errors import PluginApiMismatch, PluginDependencyMissing, PluginError, PluginNotFound
from umbel.plugins import loader
from umbel.plugins.kinds import KINDS, Kind, package_of, refusal

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

PluginState = Literal["ok", "broken", "missing library", "conflict", "incompatible", "not loaded"]
Level = Literal["warning", "error"]

_STATES: Final[Mapping[type[PluginError], PluginState]] = {
    PluginDependencyMissing: "missing library",
    PluginApiMismatch: "incompatible",
}


@frozen(kw_only=True)
class PluginRecord:
    """One installed plugin."""

    kind: str
    name: str
    distribution: str | None
    version: str | None
    target: str
    """``module:object``."""
    api_version: tuple[int, int] | None = None
    """Of the plugin API; None: not loaded, or not declared."""
    capabilities: Mapping[str, Any] | None = None
    """None: not loaded, or not known before there is an instance."""
    state: PluginState = "not loaded"
    reason: str = ""
    """Why the state is not ``ok``, in one sentence."""


def inventory(*, load: bool) -> list[PluginRecord]:
    """Every installed plugin, by kind and name. With ``load``, each is imported; none that fails harms another."""
    return [record for kind in KINDS for record in _records(kind, load)]


def _records(kind: Kind[Any], load: bool) -> Iterator[PluginRecord]:
    entry_points = sorted(loader.installed(kind), key=lambda entry_point: entry_point.name)
    for _, group in groupby(entry_points, key=lambda entry_point: entry_point.name):
        same_name = list(group)
        for entry_point in same_name:
            source = loader.source_of(kind, entry_point)
            record = PluginRecord(
                kind=kind.name,
                name=source.name,
                distribution=source.distribution,
                version=source.version,
                target=source.target,
            )
            if len(same_name) > 1:
                yield evolve(record, state="conflict", reason=str(loader.conflict(kind, same_name)))
            else:
                yield _loaded(record, kind, entry_point) if load else record


def _loaded(record: PluginRecord, kind: Kind[Any], entry_point: EntryPoint) -> PluginRecord:
    try:
        plugin = _import(kind, entry_point)
        api_version = getattr(plugin, "api_version", None)
        capabilities = inspect.getattr_static(plugin, "capabilities", None)
        record = evolve(
            record,
            api_version=api_version if isinstance(api_version, tuple) else None,
            capabilities=asdict(capabilities) if has(type(capabilities)) else None,
        )
        if refused := refusal(kind, plugin):
            raise loader.source_of(kind, entry_point).refuse(*refused)
    except PluginError as error:
        return evolve(record, state=_STATES.get(type(error), "broken"), reason=str(error))
    return evolve(record, state="ok")


def _import(kind: Kind[Any], entry_point: EntryPoint) -> Any:
    try:
        return entry_point.load()
    except (Exception, SystemExit) as error:
        raise loader.source_of(kind, entry_point).failure(error) from error


# --- static checks -------------------------------------------------------------------------------


@frozen(kw_only=True)
class Finding:
    """One thing that is wrong with a plugin."""

    kind: str
    name: str
    distribution: str | None
    check: str
    """What it fails: import, port, api_version, methods, constants, capabilities, options, name, typed."""
    level: Level
    """``error``: it will not work, or not as declared. ``warning``: it works, and its users will stumble."""
    message: str


def check(name: str) -> list[Finding]:
    """What is wrong with the plugins of that name, found without making an instance. Raises ``PluginNotFound``."""
    everything = [(kind, entry_point) for kind in KINDS for entry_point in loader.installed(kind)]
    named = [(kind, entry_point) for kind, entry_point in everything if entry_point.name == name]
    if not named:
        near = get_close_matches(name, sorted({entry_point.name for _, entry_point in everything}), n=1)
        raise PluginNotFound(
            f"no plugin {name!r} is installed{f': did you mean {near[0]!r}?' if near else ''} (umbel plugins lists all)"
        )
    return [
        Finding(
            kind=kind.name,
            name=name,
            distribution=entry_point.dist.name if entry_point.dist else None,
            check=what,
            level=level,
            message=message,
        )
        for kind, entry_point in named
        for what, level, message in _problems(kind, entry_point)
    ]


def _problems(kind: Kind[Any], entry_point: EntryPoint) -> Iterator[tuple[str, Level, str]]:
    expected = f"umbel-{entry_point.name}".replace("_", "-").lower()
    actual = entry_point.dist.name.replace("_", "-").lower() if entry_point.dist else "no distribution"
    if actual != expected:
        yield "name", "warning", f"one would look for {entry_point.name!r} in {expected}, and it is in {actual}"
    try:
        plugin = _import(kind, entry_point)
    except PluginError as error:
        yield "import", "error", str(error)
        return
    package = package_of(entry_point.value)
    spec = find_spec(package)
    if not any((Path(place) / "py.typed").is_file() for place in (spec and spec.submodule_search_locations) or ()):
        yield "typed", "warning", f"{package} has no py.typed, so type checkers ignore its annotations"
    if refused := refusal(kind, plugin):
        yield "api_version" if refused[0] is PluginApiMismatch else "port", "error", refused[1]
    elif kind.port is not None:
        yield from _driver_problems(kind, plugin)


def _driver_problems(kind: Kind[Any], driver: Any) -> Iterator[tuple[str, Level, str]]:
    if not isinstance(driver, type):
        yield "port", "error", "is an instance: the entry point must be of the class"
        return
    port = resolve_name(kind.port or "")
    if next(cls for cls in driver.__mro__ if "api_version" in vars(cls)) is port:
        yield "api_version", "warning", "inherits api_version from the port, and so claims every version: declare it"
    if missing := sorted(getattr(driver, "__abstractmethods__", ())):
        yield "methods", "error", f"lacks {', '.join(missing)} of {kind.port}"
    if missing := [name for name in kind.constants if not isinstance(getattr(driver, name, None), str)]:
        yield "constants", "error", f"lacks the class attributes {', '.join(missing)}"
    if kind.capabilities is not None:
        declared = inspect.getattr_static(driver, "capabilities", None)
        if declared is None:
            yield "capabilities", "warning", "declares no capabilities on the class: only an instance could tell"
        elif not (isinstance(declared, resolve_name(kind.capabilities)) or hasattr(declared, "__get__")):
            yield "capabilities", "error", f"declares capabilities that are not a {kind.capabilities}"
    if kind.options is not None:
        options = getattr(driver, "Options", None)
        if not (isinstance(options, type) and has(options)):
            yield "options", "error", f"has Options that are not an attrs class: {kind.options} cannot be read"
        elif missing := [f.name for f in fields(options) if f.init and f.default is NOTHING]:
            yield "options", "error", f"has options without a default: {', '.join(missing)}"
