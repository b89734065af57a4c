-- worker, connection, '1' as long as it is there, session, owner, ttl -> 'ok', or 'lost' where the worker or the connection is
if ARGV[3] == '1' then
    if not may_hold(ARGV[1], ARGV[2]) then return {'lost'} end
    keep(ARGV[1], ARGV[2], ARGV[4])
else
    drop(ARGV[1], ARGV[2])
end
for _, set in ipairs({all .. ':sessions', all .. ':sessions:' .. ARGV[5]}) do
    redis.call('ZADD', set, 'XX', now + tonumber(ARGV[6]), ARGV[4])
end
return {'ok'}
