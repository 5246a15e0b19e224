"""An honest serializer and an honest compressor."""

from __future__ import annotations

import json
import zlib
from typing import Any, ClassVar

from umbel.errors import ContentRefused, DecodeError, EncodeError
from umbel.ports.compressor import Compressor
from umbel.ports.serializer import Serializer


class HonestSerializer(Serializer):
    """JSON without extensions."""

    name: ClassVar[str] = "honest"
    content_type: ClassVar[str] = "application/x-honest"
    content_encoding: ClassVar[str] = "utf-8"

    def dumps(self, value: Any) -> bytes:
        try:
            return json.dumps(value).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise EncodeError(self.told(error)) from error

    def told(self, error: Exception) -> str:
        return str(error)

    def loads(self, data: bytes) -> Any:
        try:
            return json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise DecodeError(str(error)) from error


class HonestCompressor(Compressor):
    """zlib."""

    name: ClassVar[str] = "honest"
    encoding: ClassVar[str] = "application/x-honest"

    def compress(self, data: bytes) -> bytes:
        return zlib.compress(data)

    def decompress(self, data: bytes, limit: int) -> bytes:
        stream = zlib.decompressobj()
        try:
            restored = self.restore(stream, data, limit)
        except zlib.error as error:
            raise DecodeError(str(error)) from error
        if len(restored) > limit:
            raise ContentRefused("too large")
        if not self.complete(stream):
            raise DecodeError("truncated")
        return restored

    def restore(self, stream: Any, data: bytes, limit: int) -> bytes:
        restored: bytes = stream.decompress(data, limit + 1)
        return restored

    def complete(self, stream: Any) -> bool:
        return bool(stream.eof)
