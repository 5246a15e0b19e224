"""What must happen in one step, as Lua. Keys of single messages are made inside: the layout lives on one server.

Structures, every name behind ``global_keyprefix``:

- ``<queue>``, ``<queue> SEP <step>``, ``unacked`` (hash), ``unacked_index`` (zset): Celery's own.
- ``_umbel.leases`` (zset): tag → end of the lease of what our workers hold.
- ``_umbel.claims`` (hash): tag → record of that handing-out: claim, count, starts, whether the start was marked, score in
  ``unacked_index``, list, length of what stands behind the envelope in ``unacked``, queue.
- ``_umbel.count.<tag>``: count and starts of a message that waits again.
- ``_umbel.delayed.<queue>`` (zset): ``<step>:<envelope>`` → due time. ``_umbel.queues`` (set): names.

A claim holds while its record names it *and* the score in ``unacked_index`` is the one it wrote: whoever takes the message
over, be it a Celery worker that knows nothing of our records, writes or removes that score.
"""

from __future__ import annotations

from typing import Final

_COMMON: Final = """
local index, unacked, claims, leases, counts = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000

local function stamp(seconds) return string.format('%.6f', seconds) end

local function record(tag)
  local text = redis.call('HGET', claims, tag)
  return text and cjson.decode(text)
end

local function holds(r, tag)
  return r and redis.call('ZSCORE', index, tag) == r[5]
end

local function held(tag, claim)
  local r = record(tag)
  if r and r[1] == claim and holds(r, tag) then return r end
end

-- Celery would restore it one visibility timeout after its score, which must not be before the lease ends.
local function lease_it(tag, r, lease, visibility)
  redis.call('ZADD', index, stamp(math.max(now, now + lease - visibility)), tag)
  redis.call('ZADD', leases, stamp(now + lease), tag)
  r[5] = redis.call('ZSCORE', index, tag)
  redis.call('HSET', claims, tag, cjson.encode(r))
end

local function remember(tag, count, starts)
  if count + starts > 0 then
    redis.call('SET', counts .. tag, count .. ' ' .. starts, 'EX', 604800)
  end
end

local function let_go(tag)
  redis.call('ZREM', leases, tag)
  redis.call('HDEL', claims, tag)
end
"""

CLAIM: Final = (
    _COMMON
    + """
local claim, limit, lease, visibility = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local separator, queues = ARGV[5], tonumber(ARGV[6])
local due = math.huge
for q = 1, queues do
  local delayed, list = KEYS[5 + q], KEYS[5 + queues + q]
  local members = redis.call('ZRANGEBYSCORE', delayed, '-inf', stamp(now), 'LIMIT', 0, 500)
  for _, member in ipairs(members) do
    local step, at = string.match(member, '^(%d+)():')
    local target = step == '0' and list or list .. separator .. step
    redis.call('LPUSH', target, string.sub(member, at + 1))
    redis.call('ZREM', delayed, member)
  end
  local first = redis.call('ZRANGE', delayed, 0, 0, 'WITHSCORES')
  if first[2] then due = math.min(due, tonumber(first[2])) end
end

local restore = math.huge
local out = {'', ''}
local taken = 0
for l = 6 + 2 * queues, #KEYS do
  if taken >= limit then break end
  local q = (l - 6) % queues + 1
  local queue = ARGV[6 + q]
  local behind = ', "", ' .. cjson.encode(queue) .. ']'
  for _, raw in ipairs(redis.call('RPOP', KEYS[l], limit - taken) or {}) do
    taken = taken + 1
    local ok, envelope = pcall(cjson.decode, raw)
    local properties = ok and type(envelope) == 'table' and envelope.properties
    local headers = ok and type(envelope) == 'table' and envelope.headers
    local tag = type(properties) == 'table' and properties.delivery_tag
    if type(tag) ~= 'string' or tag == '' or redis.call('HEXISTS', unacked, tag) == 1 then
      tag = claim .. ':' .. taken
    end
    local count, starts = 0, 0
    local before, stale = redis.call('GET', counts .. tag), record(tag)
    if before then
      count, starts = string.match(before, '^(%d+) (%d+)')
      redis.call('DEL', counts .. tag)
    elseif stale then
      count, starts = stale[2], stale[3]
    elseif type(headers) == 'table' and headers.redelivered == true then
      count = 1
    end
    count, starts = tonumber(count) + 1, tonumber(starts)
    redis.call('HSET', unacked, tag, '[' .. raw .. behind)
    lease_it(tag, {claim, count, starts, 0, '', KEYS[l], #behind, queue}, lease, visibility)
    for _, value in ipairs({tag, queue, count, starts, raw}) do out[#out + 1] = value end
  end
end
local first = redis.call('ZRANGE', leases, 0, 0, 'WITHSCORES')
if first[2] then restore = tonumber(first[2]) end
first = redis.call('ZRANGE', index, 0, 0, 'WITHSCORES')
if first[2] then restore = math.min(restore, tonumber(first[2]) + visibility) end
out[1] = due == math.huge and '' or stamp(due - now)
out[2] = restore == math.huge and '' or stamp(restore - now)
return out
"""
)
"""Take what is due from the lists in their order into ``unacked``, under leases. Returns seconds until the next delayed
message and until something may have to be restored, then tag, queue, count, starts and envelope of each."""

RENEW: Final = (
    _COMMON
    + """
local lease, visibility, starting = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '1'
local out = {}
for i = 4, #ARGV, 2 do
  local tag = ARGV[i]
  local r = held(tag, ARGV[i + 1])
  out[#out + 1] = r and 1 or 0
  if r then
    if starting then r[3], r[4] = r[3] + 1, r[4] + 1 end
    lease_it(tag, r, lease, visibility)
  end
end
return out
"""
)

SETTLE: Final = (
    _COMMON
    + """
local queues, delayed = KEYS[6], KEYS[7]
local out, back = {}, {}
local i = 1
while i <= #ARGV do
  local tag, claim, action = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local r = held(tag, claim)
  out[#out + 1] = r and 1 or 0
  if r and action == 'requeue' then
    local value = redis.call('HGET', unacked, tag)
    local raw = string.sub(value, 2, -(r[7] + 1))
    local uncounted = ARGV[i + 4] == '0'
    remember(tag, r[2] - (uncounted and 1 or 0), r[3] - (uncounted and r[4] or 0))
    if tonumber(ARGV[i + 3]) > 0 then
      redis.call('ZADD', delayed .. r[8], stamp(now + tonumber(ARGV[i + 3])), ARGV[i + 5] .. ':' .. raw)
    else
      back[#back + 1] = {r[6], raw}
    end
  elseif r and action == 'dead' then
    redis.call('LPUSH', ARGV[i + 3], ARGV[i + 5])
    redis.call('SADD', queues, ARGV[i + 4])
  end
  if r then
    let_go(tag)
    redis.call('ZREM', index, tag)
    redis.call('HDEL', unacked, tag)
  end
  i = i + 6
end
for b = #back, 1, -1 do redis.call('RPUSH', back[b][1], back[b][2]) end
return out
"""
)
"""Six arguments each: tag, claim, action, then for a requeue delay, counted and step, for a dead letter its list, its queue
and its envelope. Those given back at once come to the front, in the order given."""

OVERDUE: Final = (
    _COMMON
    + """
local visibility = tonumber(ARGV[1])
local tags, seen = {}, {}
for _, tag in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', stamp(now), 'LIMIT', 0, 100)) do
  local r = record(tag)
  if holds(r, tag) then
    tags[#tags + 1] = tag
    seen[tag] = true
  else
    if r then remember(tag, r[2], r[3]) end
    let_go(tag)
  end
end
for _, tag in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', stamp(now - visibility), 'LIMIT', 0, 100)) do
  if not seen[tag] and not holds(record(tag), tag) then tags[#tags + 1] = tag end
end
local out = {}
for _, tag in ipairs(tags) do
  out[#out + 1] = tag
  out[#out + 1] = redis.call('ZSCORE', index, tag)
  out[#out + 1] = redis.call('HGET', unacked, tag) or ''
end
return out
"""
)
"""Tag, score and ``unacked`` value of what its taker has held for too long: ours after its lease, Celery's after the
visibility timeout. Records of ours that Celery has restored meanwhile are put away."""

RESTORE: Final = (
    _COMMON
    + """
local tag, score, envelope = ARGV[1], ARGV[2], ARGV[3]
if redis.call('ZSCORE', index, tag) ~= score then return 0 end
local r = record(tag)
if holds(r, tag) then remember(tag, r[2], r[3]) end
let_go(tag)
redis.call('ZREM', index, tag)
if envelope ~= '' then
  redis.call('HDEL', unacked, tag)
  for l = 6, #KEYS do redis.call('RPUSH', KEYS[l], envelope) end
end
return 1
"""
)
"""Put one overdue message back to the front of its lists, unless somebody was quicker."""

DEPTH: Final = (
    _COMMON
    + """
local held = {}
for _, tag in ipairs(redis.call('ZRANGE', index, 0, -1)) do
  local r = record(tag)
  local queue = r and holds(r, tag) and r[8]
  if not queue then
    local value = redis.call('HGET', unacked, tag)
    local name = value and string.match(string.sub(value, -1024), '("[^"]*")%s*%]$')
    queue = name and cjson.decode(name)
  end
  if queue then held[queue] = (held[queue] or 0) + 1 end
end
local out = {}
for q, queue in ipairs(ARGV) do out[q] = held[queue] or 0 end
return out
"""
)
"""How many messages of each queue are handed out, by us or by Celery."""

PEEK: Final = """
local offset, left = tonumber(ARGV[1]), tonumber(ARGV[2])
local out = {0}
for l = 2, #KEYS do
  local length = redis.call('LLEN', KEYS[l])
  if left > 0 and offset < length then
    local part = redis.call('LRANGE', KEYS[l], -(offset + left), -(offset + 1))
    for i = #part, 1, -1 do out[#out + 1] = part[i] end
    left = left - #part
  end
  offset = math.max(0, offset - length)
end
out[1] = #out - 1
if left > 0 then
  for _, member in ipairs(redis.call('ZRANGE', KEYS[1], offset, offset + left - 1, 'WITHSCORES')) do
    out[#out + 1] = member
  end
end
return out
"""
"""How many are ready, their envelopes in order, then members of the delayed set, each followed by its due time."""

PURGE: Final = """
local total = redis.call('ZCARD', KEYS[1])
for l = 2, #KEYS do total = total + redis.call('LLEN', KEYS[l]) end
redis.call('UNLINK', unpack(KEYS))
return total
"""
