"""Connections of redis-py that say so when they were lost."""

from __future__ import annotations

from functools import cache
from typing import Any

from redis import exceptions


class _Honest:
    """From CPython 3.12 on, a transport of asyncio's that was lost fails with an ``AttributeError``, or a ``TypeError``, when it
    is written to, and redis-py lets that through."""

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        try:
            await super().send_packed_command(command, check_health)  # type: ignore[misc]  # mixed into a connection class
        except (AttributeError, TypeError) as error:
            raise exceptions.ConnectionError(f"the connection was lost before this was written: {error}") from error


def honest(pool: Any) -> None:
    """Let the connections that ``pool`` of redis-py's makes from now on raise ``ConnectionError`` then."""
    pool.connection_class = _honest(pool.connection_class)


@cache
def _honest(connection_class: type[Any]) -> type[Any]:
    return type(connection_class.__name__, (_Honest, connection_class), {})
