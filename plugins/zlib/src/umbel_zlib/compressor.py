"""The wire's ``application/x-gzip``, which is a zlib stream."""

from __future__ import annotations

import zlib
from typing import ClassVar, Final

from umbel.errors import ContentRefused, DecodeError
from umbel.ports.compressor import Compressor

_ZLIB_OR_GZIP: Final = zlib.MAX_WBITS | 32
"""Take either header. The two cannot be confused, and a peer that takes the name at its word sends gzip."""


class ZlibCompressor(Compressor):
    """Writes zlib streams (``78 9c``), as every peer of the wire does; reads those and gzip streams of one member."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "zlib"
    encoding: ClassVar[str] = "application/x-gzip"
    aliases: ClassVar[tuple[str, ...]] = ("zlib", "gzip")

    def compress(self, data: bytes) -> bytes:
        """Compress ``data`` at zlib's default level."""
        return zlib.compress(data)

    def decompress(self, data: bytes, limit: int) -> bytes:
        """Restore ``data``. Raises ``ContentRefused`` past ``limit`` bytes, ``DecodeError`` for any damage."""
        stream = zlib.decompressobj(_ZLIB_OR_GZIP)
        try:
            # One byte more than is allowed: enough to tell, and never 0, which zlib takes for "no bound".
            restored = stream.decompress(data, limit + 1)
        except zlib.error as error:
            raise DecodeError(f"damaged zlib stream: {error}") from error
        if len(restored) > limit:
            raise ContentRefused(
                f"decompressed, the body exceeds the {limit:,} bytes that [codec] max_body_size allows"
            )
        if not stream.eof:
            raise DecodeError(f"truncated zlib stream: it breaks off after {len(data):,} bytes")
        if stream.unused_data:
            raise DecodeError(f"{len(stream.unused_data):,} bytes follow the end of the zlib stream")
        return restored
