"""The wire's ``application/x-lzma``: one stream in an .xz container."""

from __future__ import annotations

import lzma
from typing import ClassVar, Final

from umbel.errors import ContentRefused, DecodeError
from umbel.ports.compressor import Compressor

_MEMORY: Final = 80 << 20
"""Enough to read what any preset of xz wrote (65 MiB); a stream may declare a dictionary of 4 GiB."""

_SMALLEST, _LARGEST = 1 << 12, 1 << 23
"""Dictionary sizes: the least that xz has, and that of its default preset."""


class LzmaCompressor(Compressor):
    """Writes and reads single .xz streams (``fd 37 7a 58 5a 00``), as every peer of the wire does."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "lzma"
    encoding: ClassVar[str] = "application/x-lzma"
    aliases: ClassVar[tuple[str, ...]] = ("lzma", "xz")

    def compress(self, data: bytes) -> bytes:
        """Compress ``data`` at the default preset, with a dictionary no larger than it: both ends allocate all of it."""
        dictionary = min(max(1 << len(data).bit_length(), _SMALLEST), _LARGEST)
        return lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": dictionary}])

    def decompress(self, data: bytes, limit: int) -> bytes:
        """Restore ``data``. Raises ``ContentRefused`` past ``limit`` bytes, ``DecodeError`` for any damage."""
        stream = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MEMORY)
        try:
            # One byte more than is allowed is enough to tell.
            restored = stream.decompress(data, max_length=limit + 1)
        except lzma.LZMAError as error:
            raise DecodeError(f"damaged xz stream: {error}") from error
        if len(restored) > limit:
            raise ContentRefused(
                f"decompressed, the body exceeds the {limit:,} bytes that [codec] max_body_size allows"
            )
        if not stream.eof:
            raise DecodeError(f"truncated xz stream: it breaks off after {len(data):,} bytes")
        if stream.unused_data:
            raise DecodeError(f"{len(stream.unused_data):,} bytes follow the end of the xz stream")
        return restored
