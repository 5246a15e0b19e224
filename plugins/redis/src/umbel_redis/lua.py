"""What the scripts share: names of keys, places in the order, and what makes messages ready."""

from __future__ import annotations

from typing import Final

KEYS_OF_QUEUE: Final = 17
FENCE_LENGTH: Final = 48
"""Characters. With them a member of ``held`` has more than 64 bytes, and the set is never kept as a list that is searched
from its beginning, which doubles the server's work at a hundred members."""
SOON: Final = 5.0
"""Seconds within which every idle consumer looks at its queues: what becomes ready later need not wake one."""

KEYS: Final = f"""
local STRIDE, LEVELS, HELD, AGAIN, PAUSED, DELAYED, STARTS, WAKE = {KEYS_OF_QUEUE}, 1, 2, 3, 4, 5, 6, 7
local FENCE, SOON, PAGE = {FENCE_LENGTH} + 1, {SOON:.0f} * 1000, 1000
local call = redis.call
local function stream(k, level) return KEYS[k + STRIDE - level] end
local function now()
    local t = call('TIME')
    return t[1] * 1000 + math.floor(t[2] / 1000)
end
local function ring(k)
    if call('LLEN', KEYS[k + WAKE]) == 0 then call('LPUSH', KEYS[k + WAKE], 1) end
end
"""

ENTRIES: Final = """
local function place(level, id)
    local ms, seq = id:match('^(%d+)-(%d+)$')
    return (9 - level) .. ('0'):rep(14 - #ms) .. ms .. ('0'):rep(20 - #seq) .. seq .. id
end
local function placed(member) return 57 - member:byte(), member:sub(36) end
local function referred(member) return member:byte() - 48, member:sub(3) end
local function leased(member) return member:byte() - 48, member:sub(3, -FENCE - 1) end
local function put_again(k, level, id) call('ZADD', KEYS[k + AGAIN], 0, place(level, id)) end
local function forget(k, level, ids)
    call('XACK', stream(k, level), 'umbel', unpack(ids))
    call('XDEL', stream(k, level), unpack(ids))
    if call('EXISTS', KEYS[k + STARTS]) == 1 then
        for _, id in ipairs(ids) do call('HDEL', KEYS[k + STARTS], level .. ':' .. id) end
    end
end
"""

PROMOTE: Final = """
local function levels_of(k)
    local used, levels = {}, {}
    for _, name in ipairs(call('HKEYS', KEYS[k + LEVELS])) do used[name] = true end
    for level = 9, 0, -1 do
        if used[tostring(level)] then levels[#levels + 1] = level end
    end
    return levels, used
end
local function due(key, t, most)
    local members = call('ZRANGEBYSCORE', key, '-inf', t, 'LIMIT', 0, most)
    return members, #members > 0
end
local function promote(k, t, most)
    local members, some = due(KEYS[k + DELAYED], t, most)
    if some then
        for _, m in ipairs(members) do
            local size, at = m:match('^(%d+):()', 18)
            call('XADD', stream(k, m:sub(17, 17)), '*', m:sub(at, at + size - 1), m:sub(at + size))
        end
        call('ZREMRANGEBYRANK', KEYS[k + DELAYED], 0, #members - 1)
    end
    for _, kind in ipairs({{PAUSED, referred}, {HELD, leased}}) do
        members, some = due(KEYS[k + kind[1]], t, most)
        if some then
            for _, m in ipairs(members) do put_again(k, kind[2](m)) end
            call('ZREMRANGEBYRANK', KEYS[k + kind[1]], 0, #members - 1)
        end
    end
end
local function pending(k, level)
    local summary = redis.pcall('XPENDING', stream(k, level), 'umbel')
    return summary.err and 0 or summary[1]
end
local function read(k, level, count, ...)
    local streams = {'COUNT', count, ...}
    streams[#streams + 1] = 'STREAMS'
    streams[#streams + 1] = stream(k, level)
    streams[#streams + 1] = '>'
    return redis.pcall('XREADGROUP', 'GROUP', 'umbel', 'umbel', unpack(streams))
end
local function fresh(k, level, count, ...)
    local answer = read(k, level, count, ...)
    if answer and answer.err then
        if not answer.err:find('NOGROUP', 1, true) then error(answer) end
        -- The group is new, or was lost: then all that is left of the stream is read again, and no old lease counts.
        for _, kind in ipairs({{PAUSED, referred}, {HELD, leased}, {AGAIN, placed}}) do
            for _, m in ipairs(call('ZRANGE', KEYS[k + kind[1]], 0, -1)) do
                if kind[2](m) == level then call('ZREM', KEYS[k + kind[1]], m) end
            end
        end
        call('XGROUP', 'CREATE', stream(k, level), 'umbel', 0, 'MKSTREAM')
        answer = read(k, level, count, ...)
        if answer and answer.err then error(answer) end
    end
    return answer and answer[1][2] or {}
end
"""
