"""What an operator should know about the server before messages are trusted to it."""

from __future__ import annotations

import logging
from typing import Final

from umbel.errors import BrokerUnavailable, PublishRefused, ResultStoreUnavailable
from umbel_redis.session import Session

log = logging.getLogger("umbel.redis")

_OLDEST: Final = (7, 0)
_told: set[str] = set()
"""Sentences that this process has logged: a session that is rebuilt does not repeat them."""


async def inspect(session: Session) -> None:
    """Raises ``PublishRefused`` for a server too old, ``BrokerUnavailable``; warns of one that may lose messages."""
    info = await session.call(("INFO", "server"))
    if session.clustered and "redis_version" not in info:  # by node
        info = next(iter(info.values()))
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        raise PublishRefused(
            f"{session.address} runs Redis {version}; the transport needs {needed} or newer, or Valkey"
        )
    await look(session, "messages")


async def look(session: Session, kept: str) -> None:
    """Warn of a server that may lose what is ``kept`` there. Raises ``BrokerUnavailable``, ``ResultStoreUnavailable``."""
    try:
        config = await session.call(("CONFIG GET", "maxmemory*", "appendonly", "save"))
    except (BrokerUnavailable, ResultStoreUnavailable) as error:
        if not session.permanent(error):
            raise
        log.debug("whether %s may lose %s cannot be seen: %s", session.address, kept, error)
        return
    for sentence in _warnings({_text(name): _text(value) for name, value in config.items()}, kept):
        if (told := f"{session.address}: {sentence}") not in _told:
            _told.add(told)
            log.warning("%s", told)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _warnings(config: dict[str, str], kept: str) -> list[str]:
    found = []
    policy = config.get("maxmemory-policy", "noeviction")
    if config.get("maxmemory", "0") != "0" and policy != "noeviction":
        found.append(
            f"it may delete {kept} when memory runs short (maxmemory-policy {policy}): "
            "put `maxmemory-policy noeviction` into redis.conf"
        )
    if config.get("appendonly") == "no" and config.get("save") == "":
        found.append(f"it keeps nothing on disk, and its end loses all {kept}: put `appendonly yes` into redis.conf")
    return found
