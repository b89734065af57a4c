-- digest, lifetime: in place of an earlier ticket
redis.call('SET', KEYS[1] .. ':ticket', ARGV[1], 'PX', ARGV[2])
