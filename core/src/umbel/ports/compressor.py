"""The compressor port: fewer bytes, with a bound on how many come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar


class Compressor(ABC):
    """Makes bytes smaller and restores them. Stateless, thread-safe, never does I/O."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str]
    encoding: ClassVar[str]
    """Value of the header ``compression``, ``application/x-gzip``."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other values of that header that mean the same."""

    @abstractmethod
    def compress(self, data: bytes) -> bytes:
        """Compress ``data``, however large."""

    @abstractmethod
    def decompress(self, data: bytes, limit: int) -> bytes:
        """Restore ``data``.

        Never allocates much more than ``limit`` bytes: raises ``ContentRefused`` as soon as the output would be
        longer, and ``DecodeError`` for damaged or truncated input. Raises nothing else.
        """
