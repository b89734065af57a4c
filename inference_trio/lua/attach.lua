-- ttl, connection, after (or nothing)
-- -> 'ok', epoch, previous connection, version, unsent, after, base, latest, workers, statuses of tasks
local ttl, conn, after = ARGV[1], ARGV[2], ARGV[3] == '' and s.latest or tonumber(ARGV[3])
if after > s.latest then return {'beyond', s.latest} end
if s.conn ~= conn then
    if is_past(conn) then return {'gone'} end
    make_past(conn)
    redis.call('HSET', key, 'previous', s.conn)
    s.conn, s.epoch, s.idle = conn, s.epoch + 1, -1
    move_cursor(after)
end
save(ttl)
local statuses = {}
for _, status in ipairs(redis.call('HVALS', tasks)) do
    statuses[#statuses + 1] = string.match(status, '^%S+ %S+ (.*)$')
end
local previous = redis.call('HGET', key, 'previous')
return {'ok', s.epoch, previous, s.version, unsent(), after, s.base, s.latest, workers(), statuses}
