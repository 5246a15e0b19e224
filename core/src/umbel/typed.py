"""Typed tasks: arguments and results as the annotations say, by cattrs. Imported only when a task asks with ``typed=True``.

cattrs is imported here and in ``settings.structure`` only; both are loaded on first need.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import cache
from typing import Any, get_type_hints
from uuid import UUID

import cattrs
from cattrs.strategies import configure_union_passthrough

from umbel.errors import DecodeError, EncodeError

_PASS = (datetime, date, time, Decimal, UUID, bytes)
"""Types that serializers carry by themselves; where one arrived as text, it is read from text."""


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(unstruct_collection_overrides={frozenset: list, set: list, tuple: list})
    readers: dict[type, Callable[[Any], Any]] = {
        datetime: datetime.fromisoformat,
        date: date.fromisoformat,
        time: time.fromisoformat,
        Decimal: Decimal,
        UUID: UUID,
        bytes: lambda value: value.encode(),
    }
    for cls in _PASS:
        converter.register_unstructure_hook(cls, lambda value: value)
        converter.register_structure_hook(cls, _reader(cls, readers[cls]))
    converter.register_unstructure_hook(timedelta, lambda value: value.total_seconds())
    converter.register_structure_hook(
        timedelta, lambda value, _: value if isinstance(value, timedelta) else timedelta(seconds=value)
    )
    configure_union_passthrough(str | bool | int | float | None, converter)
    converter.register_unstructure_hook(enum.Enum, lambda value: converter.unstructure(value.value))
    return converter


def _reader(cls: type, read: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda value, _: value if isinstance(value, cls) else read(value)


@cache
def converter() -> cattrs.Converter:
    """The one converter for task arguments and results. Register hooks of your own types on it."""
    return _make_converter()


@cache
def _parameters(function: Callable[..., Any], bound: bool) -> tuple[inspect.Signature, dict[str, Any]]:
    signature = inspect.signature(function)
    if bound:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature, get_type_hints(function)


def unstructure(value: Any, what: str) -> Any:
    """A typed value as plain data. Raises ``EncodeError``."""
    try:
        return converter().unstructure(value)
    except Exception as exc:  # hooks of user types may raise anything; the caller is told which task and what
        raise EncodeError(f"{what}: cannot be turned into plain data: {exc}") from exc


def structure_arguments(
    function: Callable[..., Any], bound: bool, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments as the annotations of ``function`` want them. Raises ``DecodeError`` naming the parameter.

    Arguments that do not fit the signature are left as they are: the call itself says so best.
    """
    signature, hints = _parameters(function, bound)
    try:
        call = signature.bind(*args, **kwargs)
    except TypeError:
        return list(args), dict(kwargs)
    for name, value in call.arguments.items():
        if (hint := hints.get(name)) is None:
            continue
        match signature.parameters[name].kind:
            case inspect.Parameter.VAR_POSITIONAL:
                call.arguments[name] = tuple(structure(item, hint, f"argument {name!r}") for item in value)
            case inspect.Parameter.VAR_KEYWORD:
                call.arguments[name] = {k: structure(v, hint, f"argument {k!r}") for k, v in value.items()}
            case _:
                call.arguments[name] = structure(value, hint, f"argument {name!r}")
    return list(call.args), dict(call.kwargs)


def structure_result(function: Callable[..., Any], value: Any) -> Any:
    """A result as the return annotation of ``function`` wants it. Raises ``DecodeError``."""
    hint = get_type_hints(function).get("return", Any)
    return value if hint is Any else structure(value, hint, "the result")


def structure(value: Any, hint: Any, what: str) -> Any:
    """``value`` as ``hint``. Raises ``DecodeError`` saying what does not fit."""
    try:
        return converter().structure(value, hint)
    except Exception as exc:  # an exception group of whatever the hooks raised; told as one sentence
        reasons = "; ".join(cattrs.transform_error(exc)) if isinstance(exc, ExceptionGroup) else str(exc)
        raise DecodeError(f"{what} does not fit {hint}: {reasons}") from exc
