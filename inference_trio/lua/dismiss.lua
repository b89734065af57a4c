-- worker, task, owner
local ended = all .. ':ended:' .. ARGV[1]
if redis.call('HDEL', all .. ':held:' .. ARGV[1], ARGV[2]) == 1 then
    redis.call('HINCRBY', counts, 'tasks', -1)
    redis.call('HINCRBY', counts, 'tasks:' .. ARGV[3], -1)
end
-- Against a late copy of its admission.
redis.call('SET', ended, string.sub(ARGV[2] .. ' ' .. (redis.call('GET', ended) or ''), 1, 4000), 'PX', 60000)
