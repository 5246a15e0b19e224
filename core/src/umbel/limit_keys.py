"""Keys of concurrency limits: worked out by who sends, from the arguments, because a worker does not look into a body."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.model import TaskOptions

HEADER: Final = "umbel-key"
"""The header that carries a call's key."""
_LONGEST: Final = 200
"""Characters of a key; a longer one is told apart by its digest."""


@lru_cache(maxsize=1024)
def _signature(function: Callable[..., Any], bind: bool) -> inspect.Signature:
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:]) if bind else signature


def key_of(
    template: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    function: Callable[..., Any] | None = None,
    *,
    bind: bool = False,
) -> str:
    """``template`` (``"{tenant}"``, ``"{order[shop]}-{0}"``) filled in with the arguments of one call.

    Names are those of ``function``, defaults included; without it only keyword arguments have names. ``bind``: its first
    parameter is the task. Raises ``ValueError`` naming the template where an argument is missing.
    """
    try:
        names = dict(kwargs)
        if function is not None:
            bound = _signature(function, bind).bind(*args, **kwargs)
            bound.apply_defaults()
            names = {**bound.arguments, **kwargs}
        return short(template.format(*args, **names))
    except (LookupError, AttributeError, TypeError, ValueError) as exc:
        raise ValueError(f"concurrency_key {template!r} cannot be filled in from the arguments: {exc!r}") from exc


def of_call(
    app: Umbel, task: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: TaskOptions, key: str | None
) -> str:
    """The key of one call of ``task``: the one it is given, else what ``concurrency_key`` says. Raises ``ValueError``."""
    if key is not None:
        return short(str(key))
    template = options.concurrency_key or ""
    if task not in app.tasks:
        return key_of(template, args, kwargs)
    return key_of(template, args, kwargs, app.tasks[task].run, bind=app.tasks[task].bind)


def short(key: str) -> str:
    """``key``, or what stands for one that is too long for a name."""
    return key if len(key) <= _LONGEST else f"{key[:100]}…{hashlib.sha256(key.encode()).hexdigest()}"
