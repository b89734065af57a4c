-- worker, lease, longest time between two renewals of anyone while Redis is there (ms), its era (or nothing, to join),
-- renewals seen, a name for the next era, '1' where Redis was found to have less than it had
-- -> era, renewals, workers whose lease has run out; or 'lost' where this one's has
local root = KEYS[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local worker, lease, DAY = ARGV[1], tonumber(ARGV[2]), 86400000
local renewals = redis.call('HINCRBY', root, 'renewals', 1)
local era = redis.call('HGET', root, 'era')
local function lease_in(e) return tonumber(redis.call('ZSCORE', root .. ':' .. e .. ':leases', worker) or 0) end
-- To a worker that others have given up, what they have ended since looks forgotten.
local is_behind = ARGV[7] == '1' and era == ARGV[4] and lease_in(era) >= now
if not era or renewals <= tonumber(ARGV[5]) or is_behind then
    -- Beyond what any other worker has seen, as there are fewer renewals than milliseconds: one era begins, not several.
    era, renewals = ARGV[6], math.max(now, tonumber(ARGV[5]) + 1000)
    redis.call('HSET', root, 'era', era, 'renewals', renewals)
end
local before = tonumber(redis.call('HGET', root, 'renewed') or now)
redis.call('HSET', root, 'renewed', now)
if ARGV[4] ~= '' and ARGV[4] ~= era then return {'lost'} end
local all = root .. ':' .. era
local leases = all .. ':leases'
if now - before > tonumber(ARGV[3]) then
    for _, other in ipairs(redis.call('ZRANGE', leases, 0, -1)) do redis.call('ZADD', leases, now + lease, other) end
end
if ARGV[4] ~= '' and lease_in(era) < now then return {'lost'} end
redis.call('ZADD', leases, now + lease, worker)
for _, name in ipairs({leases, all .. ':counts', all .. ':held:' .. worker}) do redis.call('PEXPIRE', name, DAY) end
return {era, renewals, redis.call('ZRANGEBYSCORE', leases, '-inf', '(' .. now)}
