"""Exceptions of upcalls as plain data."""

from __future__ import annotations

import builtins
import marshal
from typing import Any

from umbel import errors
from umbel.errors import UmbelError

_HOMES = {"builtins": builtins, "umbel.errors": errors}


def to_plain(error: Exception) -> tuple[Any, ...]:
    """``error`` for a pipe: module, class, arguments, attributes, text. What is not plain data becomes text."""
    kind = type(error)
    attributes = {name: _plain(value) for name, value in vars(error).items() if not name.startswith("__")}
    return kind.__module__, kind.__qualname__, tuple(map(_plain, error.args)), attributes, str(error)


def from_plain(plain: tuple[Any, ...]) -> Exception:
    """The same built-in or Umbel exception again; of any other, an ``UmbelError`` that names it."""
    module, name, args, attributes, text = plain
    kind = getattr(_HOMES.get(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return UmbelError(f"{module}.{name}: {text}")
    if module == "builtins":
        return kind(*args)
    # Not called: classes of our own take other parameters than they keep in args, and keep the rest as attributes.
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(attributes)
    return error


def _plain(value: Any) -> Any:
    try:
        marshal.dumps(value)
    except ValueError:
        return repr(value)
    return value
