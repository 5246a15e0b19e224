"""Values to bytes and back, as compact JSON under a media type of its own.

To make it your format, replace the two calls to ``json`` and mend what is caught round them.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from umbel.errors import DecodeError, EncodeError
from umbel.ports.serializer import Serializer


class {{ cookiecutter.__class }}(Serializer):
    """``application/x-{{ cookiecutter.name }}``: None, bool, int, float, str, list, and dict with keys of str.

    A tuple comes back as a list. ``loads`` makes only these types, so it is safe on untrusted bytes.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "{{ cookiecutter.name }}"
    content_type: ClassVar[str] = "application/x-{{ cookiecutter.name }}"
    content_encoding: ClassVar[str] = "utf-8"

    def dumps(self, value: Any) -> bytes:
        """Encode ``value``. Raises ``EncodeError``, naming the type that has no form."""
        try:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_refuse).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise EncodeError(f"the value cannot be written as {self.name}: {error}") from error

    def loads(self, data: bytes) -> Any:
        """Decode ``data``. Raises ``DecodeError`` and nothing else."""
        try:
            return json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise DecodeError(f"not a {self.name} document: {error}") from error


def _refuse(value: object) -> Any:
    raise TypeError(f"there is no form for {type(value).__module__}.{type(value).__qualname__}")
