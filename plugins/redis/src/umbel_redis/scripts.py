"""What the server does in one step: one Lua script for each verb of the broker.

A queue is seventeen keys in one slot; every script is told all the keys it may touch. ``k`` is the number of keys before
those of the queue in hand, so that a script can serve several queues.

* A message is an entry of one *stream* a priority level; the entry's one field is the head, its value the body. The group
  ``umbel`` has one consumer: who holds an entry is said by its lease, and no dead consumer's name is left behind.
* Each entry of the pending list has exactly one member in one of three sorted sets: ``held`` (score: the end of the lease,
  member: level, id, fence), ``paused`` (score: when it may be handed out again) or ``again`` (ready; all scores are equal,
  and the member begins with what makes its place in the order). What lacks one, for a key that was lost, is found when a
  consumer has nothing to do, and is ready again; so are levels that ``levels`` has lost.
* The pending list counts: an entry handed out again is claimed, which adds one; given back uncounted, one is taken off.
* A delayed message is a member of ``delayed`` with its head and body inside, and becomes an entry when it is due.
* ``wake`` holds one token, or none: whoever takes it looks at the queue. A consumer that leaves something behind puts it
  back, so that another looks; one whose token got lost looks by itself after some seconds.

Times are the server's. The first line of a script (Redis 7.0) lets it run when memory has run out, so that queues can be
emptied; one without is refused then before its first command, never in the middle.
"""

from __future__ import annotations

from typing import Final

from umbel_redis.lua import ENTRIES, KEYS, PROMOTE
from umbel_redis.session import Script

PUBLISH: Final = Script(
    "#!lua\n"
    + KEYS
    + """
-- KEYS: levels, delayed, wake, then a stream for each level of what is ready at once
-- ARGV: for each of these streams: level, number, (head, body)…; then for each delayed message: due, level, member
local created, a, wakes = 0, 1, false
local function known(level) created = created + call('HSETNX', KEYS[1], level, 1) end
for k = 4, #KEYS do
    known(ARGV[a])
    local last = a + 1 + 2 * ARGV[a + 1]
    for i = a + 2, last, 2 do call('XADD', KEYS[k], '*', ARGV[i], ARGV[i + 1]) end
    a, wakes = last + 1, true
end
if a <= #ARGV then
    local soon = now() + SOON
    local seq = call('HINCRBY', KEYS[1], 'seq', (#ARGV - a + 1) / 3) - (#ARGV - a + 1) / 3
    for i = a, #ARGV, 3 do
        known(ARGV[i + 1])
        seq = seq + 1
        call('ZADD', KEYS[2], ARGV[i], ('%016.0f'):format(seq) .. ARGV[i + 1] .. ARGV[i + 2])
        wakes = wakes or tonumber(ARGV[i]) < soon
    end
end
if wakes and call('LLEN', KEYS[3]) == 0 then call('LPUSH', KEYS[3], 1) end
return created
"""
)
"""Answers how many levels are new: if any is, the queue may be."""

CLAIM: Final = Script(
    "#!lua flags=allow-oom\n"
    + KEYS
    + ENTRIES
    + PROMOTE
    + """
-- ARGV: most, lease in ms, fence
local most, fence, t = tonumber(ARGV[1]), ':' .. ARGV[3], now()
local expiry, left, batches = ('%.0f'):format(t + ARGV[2]), most, {}  -- a number would be written out for each
local queues = {}
for k = 0, #KEYS - 1, STRIDE do
    promote(k, t, most)
    local levels, used = levels_of(k)
    queues[#queues + 1] = {k = k, levels = levels, used = used, again = call('ZCARD', KEYS[k + AGAIN]) > 0}
end
local function hold(k, level, entries, counts, starts)
    if #entries == 0 then return end
    local leases, flat, ref = {}, {}, level .. ':'
    for i = 1, #entries do
        local entry = entries[i]
        local id, fields = entry[1], entry[2]
        leases[2 * i - 1], leases[2 * i] = expiry, ref .. id .. fence
        flat[3 * i - 2], flat[3 * i - 1], flat[3 * i] = id, fields[1], fields[2]
    end
    call('ZADD', KEYS[k + HELD], unpack(leases))
    left = left - #entries
    batches[#batches + 1] = {k / STRIDE, level, flat, counts, starts}
end
local function hold_again(k, level)
    local places = call('ZRANGEBYLEX', KEYS[k + AGAIN], '[' .. (9 - level), '[' .. (9 - level) .. ':', 'LIMIT', 0, left)
    if #places == 0 then return end
    local ids, counts, refs = {}, {}, {}
    for i, m in ipairs(places) do ids[i] = select(2, placed(m)) end
    call('ZREM', KEYS[k + AGAIN], unpack(places))
    local entries = redis.pcall('XCLAIM', stream(k, level), 'umbel', 'umbel', 0, unpack(ids))
    if entries.err or #entries == 0 then return end
    for i, entry in ipairs(entries) do
        counts[i] = call('XPENDING', stream(k, level), 'umbel', entry[1], entry[1], 1)[1][4]
        refs[i] = level .. ':' .. entry[1]
    end
    hold(k, level, entries, counts, call('HMGET', KEYS[k + STARTS], unpack(refs)))
end
for level = 9, 0, -1 do
    for _, queue in ipairs(queues) do
        if left > 0 and queue.used[tostring(level)] then
            if queue.again then hold_again(queue.k, level) end
            if left > 0 then hold(queue.k, level, fresh(queue.k, level, left), false, false) end
        end
    end
end
local function first(key)
    local found = call('ZRANGE', key, 0, 0, 'WITHSCORES')
    return found[2] and tonumber(found[2])
end
local function unread(queue)
    for _, level in ipairs(queue.levels) do
        if call('XLEN', stream(queue.k, level)) > pending(queue.k, level) then return true end
    end
    return false
end
local function adopt(queue)
    local k, number = queue.k, 0
    if call('EXISTS', unpack(KEYS, k + STRIDE - 9, k + STRIDE)) > #queue.levels then
        for level = 0, 9 do
            if call('EXISTS', stream(k, level)) == 1 then call('HSETNX', KEYS[k + LEVELS], level, 1) end
        end
        return ring(k)
    end
    for _, level in ipairs(queue.levels) do number = number + pending(k, level) end
    if number <= call('ZCARD', KEYS[k + HELD]) + call('ZCARD', KEYS[k + AGAIN]) + call('ZCARD', KEYS[k + PAUSED]) then
        return
    end
    local known = {}
    for _, kind in ipairs({{PAUSED, referred}, {HELD, leased}, {AGAIN, placed}}) do
        for _, m in ipairs(call('ZRANGE', KEYS[k + kind[1]], 0, -1)) do
            local level, id = kind[2](m)
            known[level .. ':' .. id] = true
        end
    end
    for _, level in ipairs(queue.levels) do
        local from, page = '-', nil
        repeat
            page = call('XPENDING', stream(k, level), 'umbel', from, '+', PAGE)
            for _, entry in ipairs(page) do
                if not known[level .. ':' .. entry[1]] then put_again(k, level, entry[1]) end
                from = '(' .. entry[1]
            end
        until #page < PAGE
    end
    ring(k)
end
local wait = false
for _, queue in ipairs(queues) do
    local k, soonest = queue.k, nil
    for _, kind in ipairs({DELAYED, PAUSED, HELD}) do
        local at = first(KEYS[k + kind])
        if at and (not soonest or at < soonest) then soonest = at end
    end
    if soonest and (not wait or soonest - t < wait) then wait = soonest - t end
    if left > 0 then
        if left == most then adopt(queue) end
    elseif call('EXISTS', KEYS[k + AGAIN]) == 1 or unread(queue) or (soonest and soonest < t + SOON) then
        ring(k)
    end
end
return {wait and math.max(0, wait), batches}
"""
)
"""Answers the ms until the next look is due, and batches: queue, level, (id, head, body)…, and counts and starts
unless they are handed out for the first time. Every table in an answer costs the server as much as ten strings."""

SETTLE: Final = Script(
    "#!lua flags=allow-oom\n"
    + KEYS
    + ENTRIES
    + """
-- KEYS: the queue's, then its dead letter queue's. ARGV: number of acks, acks…, then for each other delivery four:
-- lease, 'again', ms of delay, 'count:starts' if it does not count; or lease, 'dead', head, ''
local lost, acks = {}, tonumber(ARGV[1])
for from = 2, acks + 1, PAGE do
    local to = math.min(from + PAGE - 1, acks + 1)
    local scores = call('ZMSCORE', KEYS[HELD], unpack(ARGV, from, to))
    local leases, ids = {}, {}
    for i = from, to do
        if scores[i - from + 1] then
            local level, id = leased(ARGV[i])
            leases[#leases + 1] = ARGV[i]
            ids[level] = ids[level] or {}
            ids[level][#ids[level] + 1] = id
        else
            lost[#lost + 1] = i - 1
        end
    end
    if #leases > 0 then call('ZREM', KEYS[HELD], unpack(leases)) end
    for level, some in pairs(ids) do forget(0, level, some) end
end
local created = 0
for i = acks + 2, #ARGV, 4 do
    local level, id = leased(ARGV[i])
    local held = call('ZREM', KEYS[HELD], ARGV[i])
    if held == 0 then
        lost[#lost + 1] = acks + (i - acks - 2) / 4 + 1
    elseif ARGV[i + 1] == 'dead' then
        local entry = call('XRANGE', stream(0, level), id, id)[1]
        if entry then
            call('XADD', stream(STRIDE, level), '*', ARGV[i + 2], entry[2][2])
            created = created + call('HSETNX', KEYS[STRIDE + LEVELS], level, 1)
            ring(STRIDE)
        end
        forget(0, level, {id})
    else
        local delay, ref = tonumber(ARGV[i + 2]), level .. ':' .. id
        if ARGV[i + 3] ~= '' then
            local count, starts = ARGV[i + 3]:match('(%d+):(%d+)')
            redis.pcall('XCLAIM', stream(0, level), 'umbel', 'umbel', 0, id, 'RETRYCOUNT', count, 'JUSTID')
            if call('HEXISTS', KEYS[STARTS], ref) == 1 then call('HSET', KEYS[STARTS], ref, starts) end
        end
        if delay > 0 then
            call('ZADD', KEYS[PAUSED], now() + delay, ref)
        else
            put_again(0, level, id)
        end
        if delay < SOON then ring(0) end
    end
end
return {created, lost}
"""
)
"""Answers whether the dead letter queue may be new, and which deliveries, counted from one, were not held any more."""

RENEW: Final = Script(
    "#!lua flags=allow-oom\n"
    + KEYS
    + """
-- KEYS: held, starts. ARGV: lease in ms, whether work begins, leases…
local expiry, lost = ('%.0f'):format(now() + ARGV[1]), {}
for i = 3, #ARGV do
    local held = call('ZSCORE', KEYS[1], ARGV[i])
    if held then
        call('ZADD', KEYS[1], expiry, ARGV[i])
        if ARGV[2] == '1' then call('HINCRBY', KEYS[2], ARGV[i]:sub(1, -FENCE - 1), 1) end
    else
        lost[#lost + 1] = i - 2
    end
end
return lost
"""
)
"""Answers which leases, counted from one, are not held any more."""

RING: Final = Script(
    "#!lua flags=allow-oom\n"
    + KEYS
    + """
for k = 0, #KEYS - 1, STRIDE do ring(k) end
"""
)

PURGE: Final = Script(
    "#!lua flags=allow-oom\n"
    + KEYS
    + ENTRIES
    + PROMOTE
    + """
-- Answers how many were deleted by this call, which deletes only so many at once
promote(0, now(), PAGE)
local number = 0
for _, kind in ipairs({{PAUSED, referred}, {AGAIN, placed}}) do
    local members = call('ZRANGE', KEYS[kind[1]], 0, PAGE - 1)
    for _, m in ipairs(members) do
        local level, id = kind[2](m)
        forget(0, level, {id})
    end
    if #members > 0 then call('ZREM', KEYS[kind[1]], unpack(members)) end
    number = number + #members
end
for _, level in ipairs((levels_of(0))) do
    local ids = {}
    for i, entry in ipairs(fresh(0, level, PAGE, 'NOACK')) do ids[i] = entry[1] end
    if #ids > 0 then call('XDEL', stream(0, level), unpack(ids)) end
    number = number + #ids
end
number = number + call('ZCARD', KEYS[DELAYED])
call('UNLINK', KEYS[DELAYED])
return number
"""
)

SURVEY: Final = Script(
    "#!lua flags=allow-oom\n"
    + KEYS
    + ENTRIES
    + PROMOTE
    + """
-- ARGV: whether to make ready what is due
local t, levels = now(), levels_of(0)
if ARGV[1] == '1' then promote(0, t, PAGE) end
local oldest, shown = nil, {}
local function old(ms)
    ms = tonumber(ms)
    if ms and (not oldest or ms < oldest) then oldest = ms end
end
local function overdue(key)
    local found = call('ZRANGEBYSCORE', key, '-inf', t, 'WITHSCORES', 'LIMIT', 0, 1)
    old(found[2])
    return call('ZCOUNT', key, '-inf', t)
end
local ended, due_now, over = overdue(KEYS[HELD]), overdue(KEYS[DELAYED]), overdue(KEYS[PAUSED])
local ready = ended + due_now + over
for _, level in ipairs(levels) do
    local low, high = '[' .. (9 - level), '[' .. (9 - level) .. ':'
    local again = call('ZLEXCOUNT', KEYS[AGAIN], low, high)
    if again > 0 then old(call('ZRANGEBYLEX', KEYS[AGAIN], low, high, 'LIMIT', 0, 1)[1]:sub(2, 15)) end
    local unread = math.max(0, call('XLEN', stream(0, level)) - pending(0, level))
    local last = '0-0'
    if unread > 0 then
        for _, group in ipairs(call('XINFO', 'GROUPS', stream(0, level))) do
            for i = 1, #group, 2 do
                if group[i] == 'last-delivered-id' then last = group[i + 1] end
            end
        end
        local next_one = call('XRANGE', stream(0, level), '(' .. last, '+', 'COUNT', 1)[1]
        if next_one then old(next_one[1]:match('^%d+')) end
    end
    shown[#shown + 1] = {level, again, unread, last}
    ready = ready + again + unread
end
local delayed = call('ZCARD', KEYS[DELAYED]) - due_now + call('ZCARD', KEYS[PAUSED]) - over
return {ready, delayed, call('ZCARD', KEYS[HELD]) - ended, oldest or false, shown}
"""
)
"""Answers ready, delayed, leased, the oldest ready one's ms, and for each level: level, given back, unread, last read."""

ALL: Final = (PUBLISH, CLAIM, SETTLE, RENEW, RING, PURGE, SURVEY)
