local key, log, tasks = KEYS[1], KEYS[1] .. ':log', KEYS[1] .. ':tasks'
local names = {'conn', 'latest', 'total', 'base', 'freed', 'cursor', 'read', 'epoch', 'version', 'idle'}
local s, was = {}, redis.call('HMGET', key, unpack(names))
if not was[1] then return {'gone'} end
for i, name in ipairs(names) do
    if i > 1 then was[i] = tonumber(was[i]) end
    s[name] = was[i]
end

-- Only what has changed, and lifetimes, which are the same, once a second: each write goes to disk and replicas as well.
local function save(ttl)
    s.version = s.version + 1
    local fields = {}
    for i, name in ipairs(names) do
        if s[name] ~= was[i] then
            fields[#fields + 1] = name
            fields[#fields + 1] = s[name]
        end
    end
    redis.call('HSET', key, unpack(fields))
    local left = math.huge
    for _, name in ipairs({key, log, tasks}) do left = math.min(left, redis.call('PTTL', name)) end
    if left >= tonumber(ttl) then return end
    for _, name in ipairs({key, log, tasks}) do redis.call('PEXPIRE', name, ttl + 1000) end
end

local function seq_of(entry) return tonumber(string.match(entry[1], '^%d+')) end
local function end_of(entry) return tonumber(entry[2][4]) end

local function bytes_up_to(seq)
    if seq <= s.base then return s.freed end
    if seq >= s.latest then return s.total end
    return end_of(redis.call('XRANGE', log, seq .. '-0', seq .. '-0')[1])
end

local function move_cursor(seq)
    s.cursor = math.max(seq, s.base)
    s.read = bytes_up_to(s.cursor)
end

local function add(note, size)
    s.latest = s.latest + 1
    s.total = s.total + size
    redis.call('XADD', log, s.latest .. '-0', 'note', note, 'end', s.total)
end

local function unsent() return s.total - s.read end

local function worker_of(status) return string.match(status, '^(%S+) ') end

local function workers()
    local found, list = {}, {}
    for _, status in ipairs(redis.call('HVALS', tasks)) do
        local worker = worker_of(status)
        if not found[worker] then list[#list + 1] = worker end
        found[worker] = true
    end
    return list
end

-- The connection, if it has to be told that there is something after ``before``: it waits for that, and another worker
-- has it. In any case where the reply that named it may have been lost.
local function tell(worker, before, is_again)
    if s.conn == '' or (s.idle < before and not is_again) then return '' end
    if string.match(s.conn, '^[^:]+') ~= worker then return s.conn end
    if s.idle >= before then s.idle = s.latest end
    return ''
end

-- Names that are not to come back with a late copy of a script; the latest hundred or so.
local function make_past(name)
    redis.call('HSET', key, 'past', string.sub(name .. ' ' .. (redis.call('HGET', key, 'past') or ''), 1, 2000))
end

local function is_past(name)
    return string.find(redis.call('HGET', key, 'past') or '', name .. ' ', 1, true) ~= nil
end

local function is_of(worker, task) return worker_of(redis.call('HGET', tasks, task) or ' ') == worker end

local function set_status(task, status)
    redis.call('HSET', tasks, task, string.match(redis.call('HGET', tasks, task), '^%S+ %S+ ') .. status)
end

local function remove(task)
    redis.call('HDEL', tasks, task)
    make_past(task)
end
