-- worker: it has nothing any more
redis.call('ZREM', leases, ARGV[1])
redis.call('DEL', held(ARGV[1]))
