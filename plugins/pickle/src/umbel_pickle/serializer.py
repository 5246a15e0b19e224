"""Pickle as the wire has it: protocol 4, any picklable value, and no safety whatever."""

from __future__ import annotations

import pickle
from typing import Any, ClassVar, Final

from umbel.errors import DecodeError, EncodeError
from umbel.ports.serializer import Serializer

PROTOCOL: Final = 4
"""What every peer of the wire reads; later protocols gain nothing for task bodies."""


class PickleSerializer(Serializer):
    """``application/x-python-serialize``. Reading runs whatever code the bytes name: hence not ``safe``."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "pickle"
    content_type: ClassVar[str] = "application/x-python-serialize"
    content_encoding: ClassVar[str] = "binary"
    safe: ClassVar[bool] = False

    def dumps(self, value: Any) -> bytes:
        """Encode ``value``. Raises ``EncodeError``."""
        try:
            return pickle.dumps(value, protocol=PROTOCOL)
        except Exception as error:  # a class's own __reduce__ and __getstate__ run here, and may raise anything
            raise EncodeError(f"{_name(type(value))} cannot be pickled: {_name(type(error))}: {error}") from error

    def loads(self, data: bytes) -> Any:
        """Decode a pickle of any protocol, importing and calling what it names. Raises ``DecodeError``."""
        try:
            return pickle.loads(data)
        except Exception as error:  # imports and constructors named by the bytes run here, and may raise anything
            raise DecodeError(f"the pickle cannot be read: {_name(type(error))}: {error}") from error


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
