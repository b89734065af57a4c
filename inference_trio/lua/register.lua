-- ttl, worker, task, status, connection, most tasks -> 'ok', 'other' or 'many'
if s.conn ~= ARGV[5] or is_past(ARGV[3]) then return {'other'} end
if redis.call('HEXISTS', tasks, ARGV[3]) == 0 then
    if redis.call('HLEN', tasks) >= tonumber(ARGV[6]) then return {'many'} end
    redis.call('HSET', tasks, ARGV[3], ARGV[2] .. ' ' .. s.latest .. ' ' .. ARGV[4])
end
save(ARGV[1])
return {'ok'}
