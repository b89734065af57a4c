-- What concerns all workers, in one era.
local all = KEYS[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local leases, counts = all .. ':leases', all .. ':counts'
local DAY = 86400000

local function is_alive(worker) return tonumber(redis.call('ZSCORE', leases, worker) or 0) >= now end

-- What a worker had, and what is not to come back with a late copy of a script: the latest hundred or so.
local function held(worker) return all .. ':held:' .. worker end

local function keep(worker, name, value)
    redis.call('HSET', held(worker), name, value)
    redis.call('PEXPIRE', held(worker), DAY)
end

local function drop(worker, name)
    local key = all .. ':past:' .. worker
    redis.call('SET', key, string.sub(name .. ' ' .. (redis.call('GET', key) or ''), 1, 4000), 'PX', 60000)
    return redis.call('HDEL', held(worker), name) == 1
end

local function may_hold(worker, name)
    local past = redis.call('GET', all .. ':past:' .. worker) or ''
    return is_alive(worker) and not string.find(past, name .. ' ', 1, true)
end

-- Counts a request of this owner, evenly spread over a minute; seconds to wait where it is one too many.
local function spend(owner, rate)
    if rate == '' then return nil end
    local key, interval = all .. ':rate:' .. owner, 60000 / tonumber(rate)
    local spent_until = math.max(tonumber(redis.call('GET', key) or 0), now) + interval
    if spent_until - now > 60000 then return tostring((spent_until - now - 60000) / 1000) end
    redis.call('SET', key, spent_until, 'PX', 120000)
    return nil
end
