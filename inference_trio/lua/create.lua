-- ttl, tools, owner, window
if redis.call('EXISTS', KEYS[1]) == 1 then return end
redis.call('HSET', KEYS[1], 'tools', ARGV[2], 'owner', ARGV[3], 'window', ARGV[4],
    'conn', '', 'latest', 0, 'total', 0, 'base', 0, 'freed', 0, 'cursor', 0, 'read', 0,
    'epoch', 0, 'version', 0, 'idle', -1)
redis.call('PEXPIRE', KEYS[1], ARGV[1])
