"""The serializer port: values to bytes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar


class Serializer(ABC):
    """Turns plain Python values into bytes and back. Stateless, thread-safe, never does I/O.

    A driver is found by ``name`` when sending and by ``content_type`` when receiving.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str]
    content_type: ClassVar[str]
    """Media type on the wire, ``application/json``."""
    content_encoding: ClassVar[str]
    """``utf-8`` for text, ``binary`` for the rest."""
    safe: ClassVar[bool] = True
    """False where reading bytes can run code: such a serializer must be accepted by name."""

    @abstractmethod
    def dumps(self, value: Any) -> bytes:
        """Encode ``value``. Raises ``EncodeError``, naming the type that cannot be encoded."""

    @abstractmethod
    def loads(self, data: bytes) -> Any:
        """Decode ``data``. Raises ``DecodeError`` and nothing else, whatever the bytes are."""
