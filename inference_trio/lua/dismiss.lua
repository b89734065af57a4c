-- worker, task, owner
if drop(ARGV[1], ARGV[2]) then
    redis.call('HINCRBY', counts, 'tasks', -1)
    redis.call('HINCRBY', counts, 'tasks:' .. ARGV[3], -1)
end
