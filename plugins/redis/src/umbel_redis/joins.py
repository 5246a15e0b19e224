"""Joins: sets of finished members that fire once.

A join is a hash with its state and a hash with its members. The index of its shard holds the joins that are complete and not
fired, by the time at which the right to fire ends, and lives as long as the longest of them. All three lie in one slot. Time is
the server's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from umbel.ports.result_store import JoinState
from umbel_redis.keys import SHARDS, shard_of
from umbel_redis.session import Script, Session

NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

_JOIN: Final = Script(
    "-- KEYS: state, members, index. ARGV: name, size, owner, lease and lifetime in ms, then member and value of each mark\n"
    + NOW
    + """
local name, size, owner, lease, lifetime = unpack(ARGV, 1, 5)
for at = 6, #ARGV, 2 do redis.call('HSETNX', KEYS[2], ARGV[at], ARGV[at + 1]) end
if size ~= '' then redis.call('HSET', KEYS[1], 'size', size) end
if lifetime ~= '' then redis.call('HSET', KEYS[1], 'lifetime', lifetime) end
local count = redis.call('HLEN', KEYS[2])
local state = redis.call('HMGET', KEYS[1], 'size', 'owner', 'until', 'fired', 'lifetime')
local fires = 0
if state[1] and count >= tonumber(state[1]) and not state[4] then
  if not state[3] or tonumber(state[3]) <= now or state[2] == owner then
    redis.call('HSET', KEYS[1], 'owner', owner, 'until', now + lease)
    redis.call('ZADD', KEYS[3], now + lease, name)
    fires = 1
  end
end
if state[5] then
  redis.call('PEXPIRE', KEYS[1], state[5])
  redis.call('PEXPIRE', KEYS[2], state[5])
  local left = redis.call('PTTL', KEYS[3])
  local alone = left == -1 and fires == 1 and redis.call('ZCARD', KEYS[3]) == 1
  if alone or (left >= 0 and left < tonumber(state[5])) then redis.call('PEXPIRE', KEYS[3], state[5]) end
elseif fires == 1 then
  redis.call('PERSIST', KEYS[3])
end
return {count, state[1], fires}
"""
)

_FIRED: Final = Script("""
-- KEYS: state, index. ARGV: name, owner
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'fired', 1)
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
""")

_UNFIRED: Final = Script(
    "-- KEYS: index of each shard. ARGV: limit\n"
    "if redis.call('EXISTS', unpack(KEYS)) == 0 then return {} end\n"
    + NOW
    + """
local names = {}
for _, index in ipairs(KEYS) do
  local state = string.gsub(index, ':unfired$', ':state:')
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now, 'LIMIT', 0, ARGV[1])) do
    if redis.call('EXISTS', state .. name) == 1 then
      names[#names + 1] = name
    else
      redis.call('ZREM', index, name)
    end
  end
end
return names
"""
)

SCRIPTS: Final = (_JOIN, _FIRED, _UNFIRED)


class Joins:
    """The ability ``join`` on a session."""

    def __init__(self, session: Session, prefix: str) -> None:
        self._session = session
        self._prefix = prefix

    async def join(
        self, key: str, marks: Mapping[str, bytes], *, size: int | None, owner: str, lease: float, expires: float | None
    ) -> JoinState:
        flat = [part for member, value in marks.items() for part in (member, value)]
        command = _JOIN.on(
            [self._state(key), self._members(key), self._index(shard_of(key))],
            key,
            "" if size is None else size,
            owner,
            milliseconds(lease),
            "" if expires is None else milliseconds(expires),
            *flat,
        )
        count, known, fires = await self._session.call(command)
        return JoinState(count=count, size=None if known is None else int(known), fires=bool(fires))

    async def members(self, key: str) -> Mapping[str, bytes]:
        found: Mapping[bytes, bytes] = await self._session.call(("HGETALL", self._members(key)))
        return {member.decode(): value for member, value in found.items()}

    async def fired(self, key: str, owner: str) -> bool:
        command = _FIRED.on([self._state(key), self._index(shard_of(key))], key, owner)
        return bool(await self._session.call(command))

    async def unfired(self, limit: int) -> Sequence[str]:
        indexes = [self._index(shard) for shard in range(SHARDS)]
        shards: list[list[bytes]] = await self._session.each(_UNFIRED, indexes, limit)
        return [name.decode() for names in shards for name in names][:limit]

    def _base(self, shard: int) -> str:
        return f"{self._prefix}{{umbel-join-{shard}}}"

    def _state(self, key: str) -> str:
        return f"{self._base(shard_of(key))}:state:{key}"

    def _members(self, key: str) -> str:
        return f"{self._base(shard_of(key))}:members:{key}"

    def _index(self, shard: int) -> str:
        return f"{self._base(shard)}:unfired"


def milliseconds(seconds: float) -> int:
    """As Redis takes a lifetime: a whole number, at least 1."""
    return max(1, round(seconds * 1000))
