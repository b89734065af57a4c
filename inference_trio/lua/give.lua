-- ttl, worker, task, its status with these results, name of this call, epoch of the connection by which they came
-- -> 'ok'; 'other' where there was a newer connection, which may have been told that they are outstanding; or 'none'
if is_past(ARGV[5]) then return {'ok'} end
if s.epoch ~= tonumber(ARGV[6]) then return {'other'} end
if not is_of(ARGV[2], ARGV[3]) then return {'none'} end
set_status(ARGV[3], ARGV[4])
make_past(ARGV[5])
save(ARGV[1])
return {'ok'}
