-- session, owner, ttl, most sessions, most of the owner, most requests a minute, worker -> 'ok', or why not
local both, mine = all .. ':sessions', all .. ':sessions:' .. ARGV[2]
if not is_alive(ARGV[7]) then return {'lost'} end
for _, set in ipairs({both, mine}) do redis.call('ZREMRANGEBYSCORE', set, '-inf', now) end
if not redis.call('ZSCORE', both, ARGV[1]) then
    if ARGV[5] ~= '' and redis.call('ZCARD', mine) >= tonumber(ARGV[5]) then return {'owner'} end
    if redis.call('ZCARD', both) >= tonumber(ARGV[4]) then return {'many'} end
    local wait = spend(ARGV[2], ARGV[6])
    if wait then return {'rate', wait} end
end
for _, set in ipairs({both, mine}) do
    redis.call('ZADD', set, now + tonumber(ARGV[3]), ARGV[1])
    redis.call('PEXPIRE', set, math.max(tonumber(ARGV[3]), DAY))
end
return {'ok'}
