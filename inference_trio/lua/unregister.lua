-- ttl, epoch of the connection that asked for it, task, note of its error, size -> 'ok', connection to tell
-- A newer connection may have been told of the task: then it has to hear of its end, too.
local has_end = redis.call('HEXISTS', tasks, ARGV[3]) == 1 and s.epoch ~= tonumber(ARGV[2])
remove(ARGV[3])
if has_end then add(ARGV[4], tonumber(ARGV[5]) + #ARGV[4]) end
save(ARGV[1])
return {'ok', has_end and s.conn or ''}
