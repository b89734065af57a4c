-- ttl, worker, batch, the batch before that is known to be here, half of the limit, number of statuses,
-- {task, status or nothing when it has ended}..., {task, size, note}...
-- -> 'ok', version, unsent, connection to tell, first number, tasks of others; or 'behind' where that batch is not here
local ttl, worker, batch, half = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[5])
local before = s.latest
local memory = 'batch:' .. worker
local done, first, others = string.match(redis.call('HGET', key, memory) or '0 0 ', '^(%d+) (%d+) (.*)$')
if tonumber(done) < tonumber(ARGV[4]) then return {'behind'} end
local is_again = batch <= tonumber(done)
if not is_again then
    local notes = 7 + 2 * tonumber(ARGV[6])
    local foreign, is_mine = {}, {}
    local function check(task)
        if is_mine[task] == nil then
            is_mine[task] = is_of(worker, task)
            if not is_mine[task] then foreign[#foreign + 1] = task end
        end
        return is_mine[task]
    end
    first = s.latest + 1
    for i = notes, #ARGV, 3 do
        if check(ARGV[i]) then add(ARGV[i + 2], tonumber(ARGV[i + 1])) end
    end
    for i = 7, notes - 1, 2 do
        local task, status = ARGV[i], ARGV[i + 1]
        if check(task) then
            if status == '' then remove(task) else set_status(task, status) end
        end
    end
    others = table.concat(foreign, ',')
    redis.call('HSET', key, memory, batch .. ' ' .. first .. ' ' .. others)
end
while s.read - s.freed > half do
    local entry = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)[1]
    if not entry or seq_of(entry) > s.cursor or seq_of(entry) >= s.latest then break end
    s.base, s.freed = seq_of(entry), end_of(entry)
    redis.call('XDEL', log, entry[1])
end
local told = tell(worker, before, is_again)
save(ttl)
return {'ok', s.version, unsent(), told, tonumber(first), others}
