"""A connection of redis-py's that was lost says so."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from redis import exceptions

from umbel_celery.losses import honest


@pytest.mark.parametrize("error", [AttributeError, TypeError])
def test_a_transport_that_is_gone_is_a_lost_connection(error: type[Exception]) -> None:
    class Gone:
        async def send_packed_command(self, command: object, check_health: bool) -> None:
            raise error("'NoneType' object is not callable")

    pool = SimpleNamespace(connection_class=Gone)
    honest(pool)
    with pytest.raises(exceptions.ConnectionError, match="lost"):
        asyncio.run(pool.connection_class().send_packed_command([b"*1"]))
