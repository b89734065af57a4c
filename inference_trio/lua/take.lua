-- ttl, connection, what it has taken, after which number, half of the limit, bytes wanted, number of this call
-- -> 'ok', version, unsent, workers that wait for room, {seq, size, note, ...}; or why not
local conn, taken, after, half = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local wanted, call = tonumber(ARGV[6]), tonumber(ARGV[7])
if s.conn ~= conn then return {s.conn == '' and 'gone' or 'other'} end
if after > s.latest then return {'behind'} end
local last_of, last = string.match(redis.call('HGET', key, 'call') or '', '^(%S+) (%d+)$')
local is_again = last_of == conn and tonumber(last) == call
if last_of == conn and tonumber(last) > call then return {'late'} end
redis.call('HSET', key, 'call', conn .. ' ' .. call)
local was_full = unsent() >= half
if taken > s.cursor then move_cursor(taken) end
local found, so_far = {}, bytes_up_to(after)
local first = so_far
for _, entry in ipairs(redis.call('XRANGE', log, (after + 1) .. '-0', '+', 'COUNT', 256)) do
    if #found > 0 and so_far - first >= wanted then break end
    for _, value in ipairs({seq_of(entry), end_of(entry) - so_far, entry[2][2]}) do found[#found + 1] = value end
    so_far = end_of(entry)
end
if #found == 0 then s.idle = math.max(s.idle, after) end
local waiting = (was_full or is_again) and unsent() < half and workers() or {}
save(ARGV[1])
return {'ok', s.version, unsent(), waiting, found}
