"""Claims: leased, fenced keys.

A claim is a hash that expires with its lease. The index of its shard holds the names by the end of their leases, its list of
names the same in the order of the alphabet, so that those with one prefix are found without reading the others. Both expire
with the last lease in them. The counter of the shard, which never expires, gives the fences. All lie in one slot. Time is the
server's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from umbel.model import Lease
from umbel_redis.joins import NOW, milliseconds
from umbel_redis.keys import SHARDS, shard_of
from umbel_redis.session import Command, Script, Session

_CLAIM: Final = Script(
    "-- KEYS: claim, index, counter, names. ARGV: name, owner, lease in ms, value (left out: as it is)\n"
    + NOW
    + """
local held = redis.call('HMGET', KEYS[1], 'owner', 'fence', 'until', 'value')
if held[1] and tonumber(held[3]) > now then
  if held[1] ~= ARGV[2] then return held end
else
  held = {ARGV[2], redis.call('INCR', KEYS[3]), 0, ''}
end
local value = ARGV[4] or held[4]
local till = now + ARGV[3]
redis.call('HSET', KEYS[1], 'owner', ARGV[2], 'fence', held[2], 'until', till, 'value', value)
redis.call('PEXPIREAT', KEYS[1], till)
for _, over in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 100)) do
  redis.call('ZREM', KEYS[2], over)
  redis.call('ZREM', KEYS[4], over)
end
redis.call('ZADD', KEYS[2], till, ARGV[1])
redis.call('ZADD', KEYS[4], 0, ARGV[1])
local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2]
redis.call('PEXPIREAT', KEYS[2], last)
redis.call('PEXPIREAT', KEYS[4], last)
return {ARGV[2], held[2], till, value}
"""
)

_RELEASE: Final = Script("""
-- KEYS: claim, index, names. ARGV: name, owner, value (left out: any)
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[2] then return 0 end
if ARGV[3] and redis.call('HGET', KEYS[1], 'value') ~= ARGV[3] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2]
if last then
  redis.call('PEXPIREAT', KEYS[2], last)
  redis.call('PEXPIREAT', KEYS[3], last)
end
return 1
""")

_CLAIMS: Final = Script("""
-- KEYS: names of each shard. ARGV: prefix of the names
local found = {}
if redis.call('EXISTS', unpack(KEYS)) == 0 then return found end
local first, last = '[' .. ARGV[1], '(' .. ARGV[1] .. '\\255'
if ARGV[1] == '' then first, last = '-', '+' end
for _, names in ipairs(KEYS) do
  local claim = string.gsub(names, ':names$', ':held:')
  for _, name in ipairs(redis.call('ZRANGEBYLEX', names, first, last)) do
    local held = redis.call('HMGET', claim .. name, 'owner', 'fence', 'until', 'value')
    if held[1] then found[#found + 1] = {name, held} end
  end
end
return found
""")

SCRIPTS: Final = (_CLAIM, _RELEASE, _CLAIMS)


class Claims:
    """The ability ``claim`` on a session."""

    def __init__(self, session: Session, prefix: str) -> None:
        self._session = session
        self._prefix = prefix

    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None) -> Lease:
        base = self._base(shard_of(name))
        return lease_of(name, await self._session.call(claim(base, name, owner, lease=lease, value=value)))

    async def release(self, name: str, owner: str, value: bytes | None) -> bool:
        return bool(await self._session.call(release(self._base(shard_of(name)), name, owner, value)))

    async def claims(self, prefix: str) -> Sequence[Lease]:
        names = [f"{self._base(shard)}:names" for shard in range(SHARDS)]
        shards = await self._session.each(_CLAIMS, names, prefix)
        return sorted(
            (lease_of(name.decode(), held) for found in shards for name, held in found), key=lambda lease: lease.name
        )

    def _base(self, shard: int) -> str:
        return f"{self._prefix}{{umbel-claim-{shard}}}"


def claim(base: str, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Command:
    """The command whose answer ``lease_of`` reads. ``base``: before the names of keys in one slot."""
    keys = [claim_key(base, name), f"{base}:index", f"{base}:fence", f"{base}:names"]
    return _CLAIM.on(keys, name, owner, milliseconds(lease), *(() if value is None else (value,)))


def release(base: str, name: str, owner: str, value: bytes | None = None) -> Command:
    """The command that gives up what ``claim`` took; answers 0 where ``owner`` does not hold it, or not with ``value``."""
    keys = [claim_key(base, name), f"{base}:index", f"{base}:names"]
    return _RELEASE.on(keys, name, owner, *(() if value is None else (value,)))


def claim_key(base: str, name: str) -> str:
    """The hash that is there as long as the claim is held; ``fence`` is a field of it."""
    return f"{base}:held:{name}"


def lease_of(name: str, held: Sequence[Any]) -> Lease:
    owner, fence, until, value = held
    return Lease(name=name, owner=owner.decode(), fence=int(fence), until=int(until) / 1000, value=value)
