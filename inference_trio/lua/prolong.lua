-- ttl, {session, owner}...
for i = 2, #ARGV, 2 do
    for _, set in ipairs({all .. ':sessions', all .. ':sessions:' .. ARGV[i + 1]}) do
        redis.call('ZADD', set, 'XX', now + tonumber(ARGV[1]), ARGV[i])
        redis.call('PEXPIRE', set, math.max(tonumber(ARGV[1]), DAY))
    end
end
