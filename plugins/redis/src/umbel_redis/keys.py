"""The names of keys."""

from __future__ import annotations

from binascii import crc32
from typing import Final

SHARDS: Final = 16
"""Over so many slots of a cluster are joins and claims spread, each with an index of its shard beside it in the slot."""


def with_prefix(prefix: str) -> str:
    """``prefix`` as it stands before a name: set off by ``_`` unless it ends so already, which is Celery's rule."""
    return prefix if not prefix or prefix[-1] in ":_-." else prefix + "_"


def shard_of(name: str) -> int:
    """The shard of a join or a claim."""
    return crc32(name.encode()) % SHARDS
