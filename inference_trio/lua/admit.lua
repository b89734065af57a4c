-- worker, task, session, owner, most tasks, most of the owner, most requests a minute, model -> 'ok', or why not
local mine = 'tasks:' .. ARGV[4]
if redis.call('HEXISTS', held(ARGV[1]), ARGV[2]) == 1 then return {'ok'} end
if not may_hold(ARGV[1], ARGV[2]) then return {'lost'} end
if tonumber(redis.call('HGET', counts, 'tasks') or 0) >= tonumber(ARGV[5]) then return {'many'} end
if ARGV[6] ~= '' and tonumber(redis.call('HGET', counts, mine) or 0) >= tonumber(ARGV[6]) then return {'owner'} end
local wait = spend(ARGV[4], ARGV[7])
if wait then return {'rate', wait} end
keep(ARGV[1], ARGV[2], ARGV[3] .. ' ' .. ARGV[4] .. ' ' .. ARGV[8])
redis.call('HINCRBY', counts, 'tasks', 1)
redis.call('HINCRBY', counts, mine, 1)
return {'ok'}
