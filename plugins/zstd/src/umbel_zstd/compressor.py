"""The wire's ``application/zstd``: one Zstandard frame."""

from __future__ import annotations

import sys
from typing import ClassVar, Final

from umbel.errors import ContentRefused, DecodeError
from umbel.ports.compressor import Compressor

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_NARROWEST, _WIDEST = 23, 27
"""Powers of two: the window that every reader is to support (8 MiB), and the widest that readers take unless told."""

_WINDOW: Final = zstd.DecompressionParameter.window_log_max


class ZstdCompressor(Compressor):
    """Writes and reads single Zstandard frames (``28 b5 2f fd``), as every peer of the wire does.

    Beside the output, reading takes the frame's window: up to 8 MiB, or as much as the output may have.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "zstd"
    encoding: ClassVar[str] = "application/zstd"
    aliases: ClassVar[tuple[str, ...]] = ("zstd", "zstandard")

    def compress(self, data: bytes) -> bytes:
        """Compress ``data`` at Zstandard's default level."""
        return zstd.compress(data)

    def decompress(self, data: bytes, limit: int) -> bytes:
        """Restore ``data``. Raises ``ContentRefused`` past ``limit`` bytes, ``DecodeError`` for any damage."""
        stream = zstd.ZstdDecompressor(options={_WINDOW: min(max(limit.bit_length(), _NARROWEST), _WIDEST)})
        try:
            # One byte more than is allowed is enough to tell.
            restored = stream.decompress(data, max_length=limit + 1)
        except zstd.ZstdError as error:
            raise DecodeError(f"damaged Zstandard frame: {error}") from error
        if len(restored) > limit:
            raise ContentRefused(
                f"decompressed, the body exceeds the {limit:,} bytes that [codec] max_body_size allows"
            )
        if not stream.eof:
            raise DecodeError(f"truncated Zstandard frame: it breaks off after {len(data):,} bytes")
        if stream.unused_data:
            raise DecodeError(f"{len(stream.unused_data):,} bytes follow the end of the Zstandard frame")
        return restored
