"""The kinds of plugin there are, and how one is named in a sentence and refused."""

from __future__ import annotations

import re
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from attrs import field, frozen

from umbel.errors import PluginApiMismatch, PluginBroken, PluginDependencyMissing, PluginError, PluginNotFound
from umbel.hookspecs import API_VERSION

if TYPE_CHECKING:
    from umbel.ports.compressor import Compressor
    from umbel.ports.pool import Pool
    from umbel.ports.result_store import ResultStore
    from umbel.ports.scheduler import Scheduler
    from umbel.ports.serializer import Serializer
    from umbel.ports.transport import Transport

P = TypeVar("P")

_WORD: Final = re.compile(r"[A-Za-z][\w.+-]*")
_PATH: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@frozen(kw_only=True)
class Kind(Generic[P]):
    """One kind of plugin: its entry-point group, the setting that names one, and the port it must be of."""

    name: str
    group: str
    setting: str
    """The key that names such a plugin, for messages."""
    port: str | None = None
    """Dotted path of the abstract class. A path, because importing the ports costs an import of asyncio."""
    by_url: bool = False
    """Named by a URL, whose scheme is the plugin's name; otherwise by the name alone."""
    options: str | None = None
    """The settings table that the plugin's ``Options`` structures; None: such plugins have no options."""
    capabilities: str | None = None
    """Dotted path of the class of ``capabilities``; None: such drivers declare none."""
    constants: tuple[str, ...] = ()
    """Class attributes that the port leaves to the driver."""
    title: str = field(init=False)
    hook: str = field(init=False)
    """The factory hook."""

    @title.default
    def _title(self) -> str:
        return self.name.replace("_", " ")

    @hook.default
    def _hook(self) -> str:
        return f"umbel_make_{self.name}"

    def plugin_name(self, reference: str) -> str | None:
        """The name in what the setting says: a URL's scheme, a plain word, or ``pkg.mod:Class``; None: it has none."""
        if not self.by_url:
            return reference
        scheme, is_url, _ = reference.partition("://")
        if _WORD.fullmatch(scheme) or (not is_url and _PATH.fullmatch(scheme)):
            return scheme
        return None


TRANSPORT: Final[Kind[Transport]] = Kind(
    name="transport",
    group="umbel.transports",
    setting="[broker] url",
    port="umbel.ports.transport:Transport",
    by_url=True,
    options="[broker.options]",
    capabilities="umbel.capabilities:TransportCapabilities",
)
SERIALIZER: Final[Kind[Serializer]] = Kind(
    name="serializer",
    group="umbel.serializers",
    setting="[codec] serializer or accept",
    port="umbel.ports.serializer:Serializer",
    options="[plugins.options.NAME]",
    constants=("name", "content_type", "content_encoding"),
)
COMPRESSOR: Final[Kind[Compressor]] = Kind(
    name="compressor",
    group="umbel.compressors",
    setting="[codec] compression or accept_compression",
    port="umbel.ports.compressor:Compressor",
    options="[plugins.options.NAME]",
    constants=("name", "encoding"),
)
POOL: Final[Kind[Pool]] = Kind(
    name="pool",
    group="umbel.pools",
    setting="[worker] pool",
    port="umbel.ports.pool:Pool",
    options="[worker.pool_options]",
    capabilities="umbel.capabilities:PoolCapabilities",
    constants=("name",),
)
RESULT_STORE: Final[Kind[ResultStore]] = Kind(
    name="result_store",
    group="umbel.result_stores",
    setting="[results] url",
    port="umbel.ports.result_store:ResultStore",
    by_url=True,
    options="[results.options]",
    capabilities="umbel.capabilities:ResultStoreCapabilities",
)
SCHEDULER: Final[Kind[Scheduler]] = Kind(
    name="scheduler",
    group="umbel.schedulers",
    setting="[scheduler] url",
    port="umbel.ports.scheduler:Scheduler",
    by_url=True,
    options="[scheduler.options]",
    capabilities="umbel.capabilities:SchedulerCapabilities",
)
HOOK: Final[Kind[object]] = Kind(
    name="hook", group="umbel.hooks", setting="[plugins] hooks", options="[plugins.options.NAME]"
)
COMMAND: Final[Kind[object]] = Kind(name="command", group="umbel.commands", setting="the command line")

KINDS: Final[tuple[Kind[Any], ...]] = (TRANSPORT, SERIALIZER, COMPRESSOR, POOL, RESULT_STORE, SCHEDULER, HOOK, COMMAND)


@frozen(kw_only=True)
class Source:
    """Where one plugin comes from."""

    kind: Kind[Any]
    name: str
    target: str
    """``module:object``, as the entry point or the setting has it."""
    distribution: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        origin = f" ({self.distribution} {self.version})" if self.distribution else ""
        return f"{self.kind.title} {self.name!r}{origin}"

    def refuse(self, error: type[PluginError], reason: str) -> PluginError:
        """An error that says who, why, and which setting asked for it."""
        return error(f"{self} {reason} ({self.kind.setting})")

    def failure(self, error: BaseException) -> PluginError:
        """What to raise when importing or constructing the plugin has raised ``error``."""
        own = self.target.partition(":")[0].strip()
        if isinstance(error, ModuleNotFoundError) and (missing := error.name):
            if self.distribution is None and f"{own}.".startswith(f"{missing}."):
                return self.refuse(PluginNotFound, f"cannot be found: there is no module {missing!r}")
            if package_of(missing) not in (package_of(own), "umbel"):
                remedy = f": pip install {self.distribution}" if self.distribution else ""
                reason = f"needs the module {missing!r}, which is not installed{remedy}"
                return self.refuse(PluginDependencyMissing, reason)
        return self.refuse(PluginBroken, f"is broken: {self.target} raised {type(error).__name__}: {error}")


def refusal(kind: Kind[Any], plugin: object) -> tuple[type[PluginError], str] | None:
    """Why a plugin, a class or an instance, may not be used: not of its port, or of another API version. None: it may.

    A plugin is refused if it was written for another major version, or for a newer minor than this kernel has.
    """
    if kind.port is not None:
        port: type[Any] = resolve_name(kind.port)
        if not (issubclass(plugin, port) if isinstance(plugin, type) else isinstance(plugin, port)):
            return PluginBroken, f"is broken: {_path(plugin)} is not a subclass of {_path(port)}"
    match getattr(plugin, "api_version", API_VERSION):
        case (int(major), int(minor)):
            ours = "{}.{}".format(*API_VERSION)
        case other:
            return PluginBroken, f"is broken: its api_version is {other!r}, not a pair of numbers such as {API_VERSION}"
    if major == API_VERSION[0] and minor <= API_VERSION[1]:
        return None
    behind = "umbel-core" if (major, minor) > API_VERSION else "the plugin"
    return PluginApiMismatch, f"is for plugin API {major}.{minor}, and this umbel-core has {ours}: upgrade {behind}"


def _path(plugin: object) -> str:
    cls = plugin if isinstance(plugin, type) else type(plugin)
    return f"{cls.__module__}.{cls.__qualname__}"


def package_of(target: str) -> str:
    """The top-level package of a module's name or a dotted path."""
    return target.partition(":")[0].partition(".")[0].strip()
