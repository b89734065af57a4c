-- worker, '1' where it leaves by itself -> 1; or 0 where it would leave something
if ARGV[2] == '1' and redis.call('HLEN', held(ARGV[1])) > 0 then return 0 end
redis.call('ZREM', leases, ARGV[1])
redis.call('DEL', held(ARGV[1]))
return 1
