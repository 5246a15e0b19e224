"""Fewer bytes, and a bound on how many come back: zlib streams at the best level.

To make it your format, replace the calls to ``zlib``; keep the order of the four checks of ``decompress``.
"""

from __future__ import annotations

import zlib
from typing import ClassVar

from umbel.errors import ContentRefused, DecodeError
from umbel.ports.compressor import Compressor


class {{ cookiecutter.__class }}(Compressor):
    """The header ``compression: application/x-{{ cookiecutter.name }}``."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "{{ cookiecutter.name }}"
    encoding: ClassVar[str] = "application/x-{{ cookiecutter.name }}"

    def compress(self, data: bytes) -> bytes:
        """Compress ``data`` at the best level."""
        return zlib.compress(data, level=9)

    def decompress(self, data: bytes, limit: int) -> bytes:
        """Restore ``data``. Raises ``ContentRefused`` past ``limit`` bytes, ``DecodeError`` for any damage."""
        stream = zlib.decompressobj()
        try:
            # One byte more than is allowed: enough to tell, and never 0, which zlib takes for "no bound".
            restored = stream.decompress(data, limit + 1)
        except zlib.error as error:
            raise DecodeError(f"damaged {self.name} stream: {error}") from error
        if len(restored) > limit:
            raise ContentRefused(
                f"decompressed, the body exceeds the {limit:,} bytes that [codec] max_body_size allows"
            )
        if not stream.eof:
            raise DecodeError(f"truncated {self.name} stream: it breaks off after {len(data):,} bytes")
        if stream.unused_data:
            raise DecodeError(f"{len(stream.unused_data):,} bytes follow the end of the {self.name} stream")
        return restored
