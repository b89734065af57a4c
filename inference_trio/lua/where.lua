-- -> task, its worker, ...
local found = {}
for i, value in ipairs(redis.call('HGETALL', KEYS[1] .. ':tasks')) do
    found[i] = i % 2 == 1 and value or string.match(value, '^%S+')
end
return found
