-- ttl -> tools, owner, window, or nothing
for _, name in ipairs({KEYS[1], KEYS[1] .. ':log', KEYS[1] .. ':tasks'}) do redis.call('PEXPIRE', name, ARGV[1]) end
return redis.call('HMGET', KEYS[1], 'tools', 'owner', 'window')
