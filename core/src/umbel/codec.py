"""Values to message bodies and back: serializer and compressor by name, an accept-list, a bound on the size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import frozen

from umbel.errors import ContentRefused, EncodeError

if TYPE_CHECKING:
    from umbel.plugins.manager import PluginManager
    from umbel.ports.compressor import Compressor
    from umbel.ports.serializer import Serializer
    from umbel.settings.schema import CodecSettings

# Which plugin reads a media type or a compression of the wire, to name the setting that would accept it.
_OFFERED_BY = {
    "application/json": "json",
    "application/x-python-serialize": "pickle",
    "application/x-yaml": "yaml",
    "application/x-msgpack": "msgpack",
    "application/data": "auth",
    "application/x-gzip": "zlib",
    "application/x-bz2": "bzip2",
    "application/x-lzma": "lzma",
    "application/x-brotli": "brotli",
    "application/zstd": "zstd",
}


@frozen
class Encoded:
    """An encoded body and the words that describe it on the wire."""

    body: bytes
    content_type: str
    content_encoding: str
    compression: str | None = None
    """Value of the header ``compression``."""


class Codec:
    """Encodes and decodes bodies. Thread-safe; plugins are loaded on first use, only those that the settings name."""

    def __init__(
        self,
        plugins: PluginManager,
        settings: CodecSettings,
        *,
        named: tuple[str, str] = ("[codec] accept", "[codec] accept_compression"),
    ) -> None:
        """``named``: the settings that say what is read, for errors."""
        self._plugins = plugins
        self._settings = settings
        self._named = named
        self._serializers: dict[str, Serializer] = {}
        self._compressors: dict[str, Compressor] = {}
        self._accepted: dict[str, Serializer] | None = None
        self._accepted_compression: dict[str, Compressor] | None = None

    def serializer(self, name: str) -> Serializer:
        """The serializer of that name. Raises ``PluginError``."""
        if (found := self._serializers.get(name)) is None:
            with self._plugins.lock:
                if (found := self._serializers.get(name)) is None:
                    found = self._serializers[name] = self._plugins.make_serializer(name)
        return found

    def compressor(self, name: str) -> Compressor:
        """The compressor of that name. Raises ``PluginError``."""
        if (found := self._compressors.get(name)) is None:
            with self._plugins.lock:
                if (found := self._compressors.get(name)) is None:
                    found = self._compressors[name] = self._plugins.make_compressor(name)
        return found

    # Neither is a cached_property: its lock, on Python 3.11, could be held by another thread at a fork.

    @property
    def accepted(self) -> dict[str, Serializer]:
        """Serializers that may read, by content type."""
        if (accepted := self._accepted) is None:
            accepted = self._accepted = {s.content_type: s for s in map(self.serializer, self._settings.accept)}
        return accepted

    @property
    def accepted_compression(self) -> dict[str, Compressor]:
        """Compressors that may read, by every value of the header that means them."""
        if (accepted := self._accepted_compression) is None:
            names = dict.fromkeys((*self._settings.accept_compression, *filter(None, [self._settings.compression])))
            accepted = {word: c for c in map(self.compressor, names) for word in (c.encoding, c.name, *c.aliases)}
            self._accepted_compression = accepted
        return accepted

    def encode(self, value: Any, *, serializer: str | None = None, compression: str | None = None) -> Encoded:
        """Serialise and compress. Raises ``EncodeError`` (also for a body that no worker would accept), ``PluginError``."""
        chosen = self.serializer(serializer or self._settings.serializer)
        body = chosen.dumps(value)
        if len(body) > self._settings.max_body_size:
            raise EncodeError(
                f"the body would be {len(body):,} bytes long; [codec] max_body_size allows {self._settings.max_body_size:,}"
            )
        name = compression or self._settings.compression
        if not name or name == "none":
            return Encoded(body, chosen.content_type, chosen.content_encoding)
        compressor = self.compressor(name)
        return Encoded(compressor.compress(body), chosen.content_type, chosen.content_encoding, compressor.encoding)

    def decode(self, body: bytes, content_type: str, compression: object = None) -> Any:
        """Decompress and deserialise. Raises ``DecodeError`` or its ``ContentRefused``, and nothing else."""
        limit = self._settings.max_body_size
        if compression:
            compressor = self.accepted_compression.get(str(compression))
            if compressor is None:
                raise ContentRefused(_refusal("compression", str(compression), self._named[1]))
            body = compressor.decompress(body, limit)
        elif len(body) > limit:
            raise ContentRefused(f"the body is {len(body):,} bytes long; [codec] max_body_size allows {limit:,}")
        serializer = self.accepted.get(content_type)
        if serializer is None:
            raise ContentRefused(_refusal("content type", content_type, self._named[0]))
        return serializer.loads(body)


def _refusal(what: str, value: str, setting: str) -> str:
    name = _OFFERED_BY.get(value)
    remedy = f'add "{name}" to {setting}' if name else f"no plugin that reads it is in {setting}"
    return f"{what} {value[:100]!r} is not accepted: {remedy}"
