"""What is installed, and whether it is any good: ``umbel plugins`` and ``umbel plugins check NAME``."""

from __future__ import annotations

import inspect
import marshal
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from pkgutil import resolve_name
from typing import IO, TYPE_CHECKING, Any, Final, Literal

from attrs import NOTHING, asdict, evolve, fields, frozen, has

from umbel.errors import PluginApiMismatch, PluginBroken, PluginDependencyMissing, PluginError, PluginNotFound
from umbel.plugins import loader
from umbel.plugins.kinds import KINDS, Kind, package_of, refusal

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

PluginState = Literal["ok", "broken", "missing library", "conflict", "incompatible", "not loaded"]
Level = Literal["warning", "error"]

_MOST_CHILDREN: Final = 8

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


@frozen
class _Found:
    """An entry point, and what is known of it without importing it."""

    kind: Kind[Any]
    entry_point: EntryPoint
    record: PluginRecord


def inventory(*, load: bool) -> list[PluginRecord]:
    """Every installed plugin, by kind and name. With ``load``, each is imported; none that fails harms another.

    Blocks for as long as the imports take. Where the system can fork and this process has one thread, they happen in children,
    as many at once as there are processors: one that ends or kills its process is told like any other.
    """
    found = [each for kind in KINDS for each in _found(kind)]
    records = [each.record for each in found]
    if not load:
        return records
    waiting: dict[str | None, list[int]] = {}
    for index, each in enumerate(found):
        if not each.record.reason:
            waiting.setdefault(each.record.distribution, []).append(index)
    apart = hasattr(os, "fork") and threading.active_count() == 1
    for index, record in (
        _loaded_apart(found, list(waiting.values())) if apart else _loaded_here(found, waiting.values())
    ):
        records[index] = record
    return records


def _found(kind: Kind[Any]) -> Iterator[_Found]:
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
                record = evolve(record, state="conflict", reason=str(loader.conflict(kind, same_name)))
            yield _Found(kind, entry_point, record)


def _loaded_here(found: Sequence[_Found], portions: Iterable[Sequence[int]]) -> Iterator[tuple[int, PluginRecord]]:
    for index in (index for portion in portions for index in portion):
        yield index, _loaded(found[index].record, found[index].kind, found[index].entry_point)


def _loaded_apart(found: Sequence[_Found], portions: list[list[int]]) -> Iterator[tuple[int, PluginRecord]]:
    """Children take portions from one pipe, whoever is free the next. What a dead child had begun is what has killed it."""
    for port in {each.kind.port for each in found if each.kind.port}:
        resolve_name(port)  # what they all need is imported once
    while portions:
        queue, feed = os.pipe()
        with open(feed, "wb") as writing:
            writing.write(b"".join(number.to_bytes(2, "big") for number in range(len(portions))))
        children = [
            _fork(queue, found, portions) for _ in range(min(os.cpu_count() or 1, _MOST_CHILDREN, len(portions)))
        ]
        os.close(queue)
        done: set[int] = set()
        for pid, answers in children:
            begun: int | None = None
            with open(answers, "rb") as reading:
                for begun, fields_ in _answers(reading):
                    if fields_ is not None:
                        done.add(begun)
                        yield begun, PluginRecord(**fields_)
                        begun = None
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if begun is not None:
                done.add(begun)
                each = found[begun]
                source = loader.source_of(each.kind, each.entry_point)
                how = f"signal {-status}" if status < 0 else f"status {status}"
                broken = source.refuse(
                    PluginBroken, f"is broken: importing {source.target} ended the process with {how}"
                )
                yield begun, evolve(each.record, state="broken", reason=str(broken))
        if not done:  # children do not even begin: somebody kills them
            yield from _loaded_here(found, portions)
            return
        portions = [rest for portion in portions if (rest := [index for index in portion if index not in done])]


def _fork(queue: int, found: Sequence[_Found], portions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """A child that says of each plugin that it begins, and then what came of it; its process id and its answers."""
    answers, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            while number := os.read(queue, 2):  # one of several readers: two bytes are read together or not at all
                for index in portions[int.from_bytes(number, "big")]:
                    os.write(say, marshal.dumps((index, None)))
                    _, record = next(_loaded_here(found, [[index]]))
                    os.write(say, _dumped(index, record))
            status = 0
        finally:
            os._exit(status)
    os.close(say)
    return pid, answers


def _dumped(index: int, record: PluginRecord) -> bytes:
    fields_ = asdict(record)
    try:
        return marshal.dumps((index, fields_))
    except ValueError:  # only what a stranger's capabilities hold can be other than plain
        return marshal.dumps(
            (index, {**fields_, "capabilities": {n: str(v) for n, v in fields_["capabilities"].items()}})
        )


def _answers(reading: IO[bytes]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    while True:
        try:
            yield marshal.load(reading)
        except (EOFError, ValueError, TypeError):  # the end, or what a dying child had half written
            return


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
    if kind.options is not None and hasattr(driver, "Options"):
        options = getattr(driver, "Options", None)
        if not (isinstance(options, type) and has(options)):
            yield "options", "error", f"has Options that are not an attrs class: {kind.options} cannot be read"
        elif missing := [f.name for f in fields(options) if f.init and f.default is NOTHING]:
            yield "options", "error", f"has options without a default: {', '.join(missing)}"
