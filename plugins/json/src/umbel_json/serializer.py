"""JSON as the wire has it: plain data, and the ``{"__type__", "__value__"}`` forms for what JSON lacks.

One encoder and one decoder, both of the standard library, both reused. Measured on CPython 3.11 (µs a call, best of
15 rounds) with the body ``[[1], {}, {"callbacks": null, …}]`` of 78 bytes, and with one of 1 KB:

===================================  ========  =====
encode                               78 bytes  1 KB
===================================  ========  =====
``json.dumps(value, default=…)``          3.6   18.4
this module                               2.6   16.0
orjson                                    0.2    1.4
msgspec                                   0.2    2.1
-----------------------------------  --------  -----
decode
-----------------------------------  --------  -----
``JSONDecoder.decode``                    1.9   12.9
this module                               1.5   11.9
orjson, json for extension forms          0.7    4.8
msgspec, json for those and NaN           0.6    4.9
===================================  ========  =====

orjson and msgspec cannot write this format: NaN becomes ``null`` and a UUID a plain string, and neither can be told
otherwise. orjson cannot read it either: integers beyond 64 bits silently become floats. msgspec could, with this
module behind it for what it refuses; a microsecond a message does not pay for a compiled library in every install.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, ClassVar, Final
from uuid import UUID

from umbel.errors import DecodeError, EncodeError
from umbel.ports.serializer import Serializer


class JsonSerializer(Serializer):
    """``application/json``, readable by every Celery worker and client.

    ``dumps`` takes None, bool, int, float, str, list, tuple, dict, and the types with an extension form: datetime,
    date, time, Decimal, UUID, bytes. What comes back equals what went in, but for tuples, which become lists, and for
    dict keys, which become strings. ``loads`` creates only these types, so it is safe on untrusted bytes.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "json"
    content_type: ClassVar[str] = "application/json"
    content_encoding: ClassVar[str] = "utf-8"

    def dumps(self, value: Any) -> bytes:
        """Encode ``value`` as ASCII. Raises ``EncodeError``, naming the type that has no form in JSON."""
        try:
            if _QUICK is not None:
                try:
                    return "".join(_QUICK(value, 0)).encode("ascii")
                except Exception:  # told once more, by the encoder whose errors are known
                    return _ENCODER.encode(value).encode("ascii")
            return _ENCODER.encode(value).encode("ascii")
        except EncodeError:
            raise
        except RecursionError:
            raise EncodeError("the value nests too deep for JSON: flatten it, or pass a reference to it") from None
        except Exception as error:  # a subclass's own items() and a zone's utcoffset() run here, and may raise anything
            raise EncodeError(f"the value cannot be written as JSON: {error}") from error

    def loads(self, data: bytes) -> Any:
        """Decode UTF-8 JSON, NaN and Infinity included. Raises ``DecodeError`` and nothing else."""
        try:
            text = data.decode("utf-8").strip(" \t\n\r")
            # An extension form has this member, written so unless with escapes: else no object is worth a call.
            plain = '"__type__"' not in text and "\\" not in text
            value, end = (_PLAIN if plain else _DECODER).raw_decode(text)
        except RecursionError:
            raise DecodeError("the JSON document nests deeper than this interpreter can follow") from None
        except ValueError as error:
            raise DecodeError(f"not a JSON document: {error}") from error
        if end != len(text):
            raise DecodeError(f"not a JSON document: it ends at character {end}, and {len(text) - end} more follow")
        return value


def _extend(value: object) -> dict[str, Any]:
    """The extension form of a value that JSON lacks."""
    kind: str
    plain: str | dict[str, str]
    match value:
        case datetime():  # before date, whose subclass it is
            kind, plain = "datetime", value.isoformat()
        case date():
            kind, plain = "date", value.isoformat()
        case time():
            kind, plain = "time", value.isoformat()
        case Decimal():
            kind, plain = "decimal", str(value)
        case UUID():
            kind, plain = "uuid", {"hex": value.hex}
        case bytes():
            try:
                kind, plain = "bytes", value.decode("utf-8")
            except UnicodeDecodeError:
                kind, plain = "base64", b64encode(value).decode("ascii")
        case _:
            cls = type(value)
            raise EncodeError(
                f"JSON has no form for {cls.__module__}.{cls.__qualname__}: pass plain values (None, bool, int, float, "
                "str, list, dict, datetime, date, time, Decimal, UUID, bytes), or set typed=True on the task"
            )
    return {"__type__": kind, "__value__": plain}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string is wanted, not {type(value).__name__}")
    return value


_READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "datetime": lambda value: datetime.fromisoformat(_text(value)),
    "date": lambda value: datetime.fromisoformat(_text(value)).date(),
    "time": lambda value: time.fromisoformat(_text(value)),
    "decimal": lambda value: Decimal(_text(value)),
    "uuid": lambda value: UUID(hex=_text(value["hex"])),
    "bytes": lambda value: _text(value).encode("utf-8"),
    "base64": lambda value: b64decode(_text(value), validate=True),
}


def _revive(members: dict[str, Any]) -> Any:
    """The value that an extension form stands for; any other object as it is."""
    if "__type__" not in members or "__value__" not in members or len(members) != 2:
        return members
    kind, plain = members["__type__"], members["__value__"]
    read = _READERS.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise DecodeError(f"{_brief(kind)} is not a JSON extension type; known are {', '.join(_READERS)}")
    try:
        return read(plain)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise DecodeError(f"{_brief(plain)} does not fit the JSON extension type {kind!r}") from error


def _brief(value: object) -> str:
    """A foreign value as an error message may show it, however long or deep it is."""
    return repr(value[:100]) if isinstance(value, str) else f"a value of type {type(value).__name__}"


def _quick_encoder() -> Callable[[Any, int], tuple[str, ...]] | None:
    """What ``JSONEncoder.encode`` makes anew at each call, made once: 1.5 µs a body in place of 2.6. None: only CPython has it.

    It looks for no circles, as ``encode`` does; they end in a ``RecursionError``.
    """
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return None
    quick: Callable[[Any, int], tuple[str, ...]] = make(
        None, _extend, json.encoder.encode_basestring_ascii, None, ": ", ", ", False, False, True
    )
    return quick


_ENCODER: Final = json.JSONEncoder(default=_extend)
_QUICK: Final = _quick_encoder()
_DECODER: Final = json.JSONDecoder(object_hook=_revive)
_PLAIN: Final = json.JSONDecoder()
