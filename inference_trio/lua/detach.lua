-- ttl, connection, what it has taken (or nothing) -> 'ok', epoch, workers, version, unsent; or 'other' where it does not count any more
if s.conn ~= ARGV[2] and (s.conn ~= '' or redis.call('HGET', key, 'left') ~= ARGV[2]) then return {'other'} end
redis.call('HSET', key, 'left', ARGV[2])
if ARGV[3] ~= '' then move_cursor(math.max(tonumber(ARGV[3]), s.cursor)) end
s.conn = ''
save(ARGV[1])
return {'ok', s.epoch, workers(), s.version, unsent()}
