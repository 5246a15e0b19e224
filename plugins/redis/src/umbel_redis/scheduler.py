"""The store of periodic entries in Redis.

Everything lies in one slot: a hash of definitions, a hash of runs (what upsert keeps), a hash of next due times, an index of
the enabled entries by next due time, and the claim of the leader. A definition begins with ``1`` where it is enabled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from umbel.capabilities import SchedulerCapabilities
from umbel.errors import EncodeError, ResultStoreUnavailable
from umbel.model import Lease, ScheduleEntry
from umbel.ports.clock import Clock
from umbel.ports.scheduler import Scheduler
from umbel_redis import claims
from umbel_redis.keys import with_prefix
from umbel_redis.options import RedisOptions
from umbel_redis.session import Script, Session

_LEADER: Final = "leader"
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
    "-- KEYS: definitions, runs, next, due. ARGV: name, definition, runs, next of each"
    + _PLACE
    + """
for at = 1, #ARGV, 4 do
  redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 1])
  redis.call('HSETNX', KEYS[2], ARGV[at], ARGV[at + 2])
  place(ARGV[at], ARGV[at + 1], ARGV[at + 3])
end
"""
)

_MARK: Final = Script(
    "-- KEYS: definitions, runs, next, due, the leader's claim. ARGV: fence; then name, runs, next of each"
    + _PLACE
    + """
if redis.call('HGET', KEYS[5], 'fence') ~= ARGV[1] then return 0 end
for at = 2, #ARGV, 3 do
  local definition = redis.call('HGET', KEYS[1], ARGV[at])
  if definition then
    redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1])
    place(ARGV[at], definition, ARGV[at + 2])
  end
end
return 1
"""
)

_REMOVE: Final = Script("""
-- KEYS: definitions, runs, next, due. ARGV: names
local removed = 0
for _, name in ipairs(ARGV) do
  removed = removed + redis.call('HDEL', KEYS[1], name)
  redis.call('HDEL', KEYS[2], name)
  redis.call('HDEL', KEYS[3], name)
  redis.call('ZREM', KEYS[4], name)
end
return removed
""")

_READ: Final = Script("""
-- KEYS: definitions, runs, next, due. ARGV: nothing for all entries; or Unix time and limit for those that are due
local names
if #ARGV == 0 then
  names = redis.call('HKEYS', KEYS[1])
else
  names = redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', ARGV[1], 'LIMIT', 0, ARGV[2])
end
local found = {}
for number, name in ipairs(names) do
  local next = redis.call('HGET', KEYS[3], name) or 'null'
  found[number] = {name, redis.call('HGET', KEYS[1], name), redis.call('HGET', KEYS[2], name), next}
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
        self._session = Session(url, self.options, ResultStoreUnavailable, scripts)
        self._base = f"{with_prefix(self.options.prefix)}{{umbel-schedule}}"
        self._keys = [f"{self._base}:{part}" for part in ("entries", "runs", "next", "due")]
        self._leads: str | None = None
        """Who was told here that he leads."""

    async def load(self) -> Sequence[ScheduleEntry]:
        return [_entry(found) for found in await self._session.call(_READ.on(self._keys))]

    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        """Raises ``EncodeError``, with nothing changed, for an entry that JSON cannot hold."""
        rows = [(entry.name, _definition(entry), _runs(entry), _next(entry)) for entry in entries]
        parts = [rows[at : at + _AT_ONCE] for at in range(0, len(rows), _AT_ONCE)]
        if parts:
            await self._session.run([_UPSERT.on(self._keys, *(cell for row in part for cell in row)) for part in parts])

    async def remove(self, names: Sequence[str]) -> int:
        return int(await self._session.call(_REMOVE.on(self._keys, *names)))

    async def due(self, now: float, limit: int = 1000) -> Sequence[ScheduleEntry]:
        return [_entry(found) for found in await self._session.call(_READ.on(self._keys, repr(float(now)), limit))]

    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        cells = [cell for entry in entries for cell in (entry.name, _runs(entry), _next(entry))]
        return bool(await self._session.call(_MARK.on([*self._keys, self._claim_key], fence, *cells)))

    async def lead(self, owner: str, *, lease: float) -> Lease:
        answer = await self._session.call(claims.claim(self._base, _LEADER, owner, lease=lease))
        leader = claims.lease_of(_LEADER, answer)
        self._leads = owner if leader.owner == owner else None
        return leader

    async def close(self) -> None:
        """Where the server does not hear that leadership is given up, it ends with its lease."""
        owner, self._leads = self._leads, None
        if owner is not None:
            try:
                await self._session.call(claims.release(self._base, _LEADER, owner))
            except ResultStoreUnavailable:
                pass  # what the lease is for
        await self._session.close()

    @property
    def _claim_key(self) -> str:
        return claims.claim_key(self._base, _LEADER)


def _definition(entry: ScheduleEntry) -> str:
    plain = {
        "task": entry.task,
        "schedule": dict(entry.schedule),
        "args": list(entry.args),
        "kwargs": dict(entry.kwargs),
        "options": dict(entry.options),
    }
    try:
        return ("1" if entry.enabled else "0") + json.dumps(plain)
    except (TypeError, ValueError) as error:
        raise EncodeError(f"schedule entry {entry.name!r} cannot be stored: {error}") from None


def _runs(entry: ScheduleEntry) -> str:
    return json.dumps([entry.last_due, entry.total_runs])


def _next(entry: ScheduleEntry) -> str:
    return json.dumps(entry.next_due)


def _entry(found: Sequence[bytes]) -> ScheduleEntry:
    name, definition, runs, next_due = found
    plain: Mapping[str, Any] = json.loads(definition[1:])
    last_due, total_runs = json.loads(runs)
    return ScheduleEntry(
        name=name.decode(),
        task=plain["task"],
        schedule=plain["schedule"],
        args=tuple(plain["args"]),
        kwargs=plain["kwargs"],
        options=plain["options"],
        enabled=definition[:1] == b"1",
        last_due=last_due,
        next_due=json.loads(next_due),
        total_runs=total_runs,
    )
