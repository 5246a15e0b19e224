"""The wire's ``application/x-bz2``: one bzip2 stream."""

from __future__ import annotations

import bz2
from typing import ClassVar

from umbel.errors import ContentRefused, DecodeError
from umbel.ports.compressor import Compressor


class Bzip2Compressor(Compressor):
    """Writes and reads single bzip2 streams (``BZh9``). Beside the output, reading takes up to 3.7 MB."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "bzip2"
    encoding: ClassVar[str] = "application/x-bz2"
    aliases: ClassVar[tuple[str, ...]] = ("bzip2", "bzip")

    def compress(self, data: bytes) -> bytes:
        """Compress ``data`` with the largest block size."""
        return bz2.compress(data)

    def decompress(self, data: bytes, limit: int) -> bytes:
        """Restore ``data``. Raises ``ContentRefused`` past ``limit`` bytes, ``DecodeError`` for any damage."""
        stream = bz2.BZ2Decompressor()
        try:
            # One byte more than is allowed is enough to tell.
            restored = stream.decompress(data, max_length=limit + 1)
        except OSError as error:
            raise DecodeError(f"damaged bzip2 stream: {error}") from error
        if len(restored) > limit:
            raise ContentRefused(
                f"decompressed, the body exceeds the {limit:,} bytes that [codec] max_body_size allows"
            )
        if not stream.eof:
            raise DecodeError(f"truncated bzip2 stream: it breaks off after {len(data):,} bytes")
        if stream.unused_data:
            raise DecodeError(f"{len(stream.unused_data):,} bytes follow the end of the bzip2 stream")
        return restored
