-- worker, connection, '1' as long as it is there, session, owner, ttl -> 'ok', or 'lost' where the worker is
local held = all .. ':held:' .. ARGV[1]
if ARGV[3] == '1' then
    if not is_alive(ARGV[1]) then return {'lost'} end
    redis.call('HSET', held, ARGV[2], ARGV[4])
    redis.call('PEXPIRE', held, DAY)
else
    redis.call('HDEL', held, ARGV[2])
end
for _, set in ipairs({all .. ':sessions', all .. ':sessions:' .. ARGV[5]}) do
    redis.call('ZADD', set, 'XX', now + tonumber(ARGV[6]), ARGV[4])
end
return {'ok'}
