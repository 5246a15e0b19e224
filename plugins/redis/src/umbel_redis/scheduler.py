"""The store of periodic entries in Redis.

Everything lies in one slot: a hash of definitions, a hash of runs (what upsert keeps), a hash of next due times, an index of
the enabled entries by next due time, the names of the declared ones, a counter of revisions, and the claim of the leader. A
definition begins with ``1`` where it is enabled, ``0`` otherwise, then its revision and a space.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from umbel.capabilities import SchedulerCapabilities
from umbel.errors import SchedulerUnavailable
from umbel.model import Lease, ScheduleEntry
from umbel.ports.clock import Clock
from umbel.ports.scheduler import Scheduler, definition_of, entry_of, runs_of
from umbel_redis import claims
from umbel_redis.keys import with_prefix
from umbel_redis.options import RedisOptions
from umbel_redis.session import Script, Session

_LEADER: Final = "leader"
_NOBODY: Final = Lease(name=_LEADER, owner="", fence=0, until=0.0)
_AT_ONCE: Final = 500
"""Entries in one command: the server does nothing else meanwhile."""

_PLACE: Final = """
local function place(name, definition, next)
  if next == 'null' then redis.call('HDEL', KEYS[3], name) else redis.call('HSET', KEYS[3], name, next) end
  if next == 'null' or string.sub(definition, 1, 1) == '0' then
    redis.call('ZREM', KEYS[4], name)
  else
    redis.call('ZADD', KEYS[4], next, name)
  end
end
"""

_UPSERT: Final = Script(
    "-- KEYS: definitions, runs, next, due, declared, revisions. ARGV: name, enabled, declared, definition, runs, next of each"
    + _PLACE
    + """
for at = 1, #ARGV, 6 do
  local definition = ARGV[at + 1] .. redis.call('INCR', KEYS[6]) .. ' ' .. ARGV[at + 3]
  redis.call('HSET', KEYS[1], ARGV[at], definition)
  redis.call(ARGV[at + 2] == '1' and 'SADD' or 'SREM', KEYS[5], ARGV[at])
  redis.call('HSETNX', KEYS[2], ARGV[at], ARGV[at + 4])
  place(ARGV[at], definition, ARGV[at + 5])
end
"""
)

_MARK: Final = Script(
    "-- KEYS: definitions, runs, next, due, the leader's claim. ARGV: fence; then name, revision, runs, next of each"
    + _PLACE
    + """
if redis.call('HGET', KEYS[5], 'fence') ~= ARGV[1] then return 0 end
for at = 2, #ARGV, 4 do
  local definition = redis.call('HGET', KEYS[1], ARGV[at])
  if definition then
    redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 2])
    if string.sub(definition, 2, #ARGV[at + 1] + 2) == ARGV[at + 1] .. ' ' then
      place(ARGV[at], definition, ARGV[at + 3])
    end
  end
end
return 1
"""
)

_REMOVE: Final = Script("""
-- KEYS: definitions, runs, next, due, declared. ARGV: names
local removed = 0
for _, name in ipairs(ARGV) do
  removed = removed + redis.call('HDEL', KEYS[1], name)
  redis.call('HDEL', KEYS[2], name)
  redis.call('HDEL', KEYS[3], name)
  redis.call('ZREM', KEYS[4], name)
  redis.call('SREM', KEYS[5], name)
end
return removed
""")

_READ: Final = Script("""
-- KEYS: definitions, runs, next, due. ARGV: 'names' and names; or 'due', Unix time and limit
local names
if ARGV[1] == 'names' then
  names = {}
  for at = 2, #ARGV do names[at - 1] = ARGV[at] end
else
  names = redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', ARGV[2], 'LIMIT', 0, ARGV[3])
end
local found = {}
for _, name in ipairs(names) do
  local definition = redis.call('HGET', KEYS[1], name)
  if definition then
    local next = redis.call('HGET', KEYS[3], name) or 'null'
    found[#found + 1] = {name, definition, redis.call('HGET', KEYS[2], name), next}
  end
end
return found
""")


class RedisScheduler(Scheduler):
    """Keeps entries for any number of schedulers; one leads, by a fenced lease on the server's clock."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options = RedisOptions
    capabilities = SchedulerCapabilities(durable=True, shared=True)

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        scripts = (_UPSERT, _MARK, _REMOVE, _READ, *claims.SCRIPTS)
        self._session = Session(url, self.options, SchedulerUnavailable, scripts)
        self._base = f"{with_prefix(self.options.prefix)}{{umbel-schedule}}"
        self._keys = [f"{self._base}:{part}" for part in ("entries", "runs", "next", "due")]
        self._declared, self._revisions = f"{self._base}:declared", f"{self._base}:revisions"
        self._leads: str | None = None
        """Who was told here that he leads."""

    async def load(self, names: Sequence[str] | None = None, *, declared: bool = False) -> Sequence[ScheduleEntry]:
        if names is None or declared:
            listing = ("SMEMBERS", self._declared) if declared else ("HKEYS", self._keys[0])
            found = [each.decode() for each in await self._session.call(listing)]
            names = found if names is None else list(set(names).intersection(found))
        wanted = list(dict.fromkeys(names))
        parts = [wanted[at : at + _AT_ONCE] for at in range(0, len(wanted), _AT_ONCE)]
        answers = await self._session.run([_READ.on(self._keys, "names", *part) for part in parts]) if parts else []
        return [_entry(found) for answer in answers for found in answer]

    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        """See the port. More than 500 at once are not one atomic step."""
        rows = [
            (e.name, int(e.enabled), int(e.declared), definition_of(e), runs_of(e), json.dumps(e.next_due))
            for e in entries
        ]
        keys = [*self._keys, self._declared, self._revisions]
        parts = [rows[at : at + _AT_ONCE] for at in range(0, len(rows), _AT_ONCE)]
        if parts:
            await self._session.run([_UPSERT.on(keys, *(cell for row in part for cell in row)) for part in parts])

    async def remove(self, names: Sequence[str]) -> int:
        return int(await self._session.call(_REMOVE.on([*self._keys, self._declared], *names)))

    async def due(self, now: float, limit: int = 1000) -> Sequence[ScheduleEntry]:
        return [
            _entry(found) for found in await self._session.call(_READ.on(self._keys, "due", repr(float(now)), limit))
        ]

    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        cells = [
            cell
            for entry in entries
            for cell in (entry.name, entry.revision, runs_of(entry), json.dumps(entry.next_due))
        ]
        return bool(await self._session.call(_MARK.on([*self._keys, self._claim_key], fence, *cells)))

    async def lead(self, owner: str, *, lease: float) -> Lease:
        if not lease:
            await self._session.call(claims.release(self._base, _LEADER, owner))
            return await self.leader() or _NOBODY
        answer = await self._session.call(claims.claim(self._base, _LEADER, owner, lease=lease))
        leader = claims.lease_of(_LEADER, answer)
        self._leads = owner if leader.owner == owner else None
        return leader

    async def leader(self) -> Lease | None:
        owner, fence, until, value = await self._session.call(
            ("HMGET", self._claim_key, "owner", "fence", "until", "value")
        )
        return None if owner is None else claims.lease_of(_LEADER, (owner, fence, until, value))

    async def close(self) -> None:
        """Where the server does not hear that leadership is given up, it ends with its lease."""
        owner, self._leads = self._leads, None
        if owner is not None:
            try:
                await self._session.call(claims.release(self._base, _LEADER, owner))
            except SchedulerUnavailable:
                pass  # what the lease is for
        await self._session.close()

    @property
    def _claim_key(self) -> str:
        return claims.claim_key(self._base, _LEADER)


def _entry(found: Sequence[bytes]) -> ScheduleEntry:
    name, stored, runs, next_due = found
    revision, _, definition = stored[1:].partition(b" ")
    return entry_of(name.decode(), definition, runs, json.loads(next_due), int(revision))
