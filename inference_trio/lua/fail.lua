-- ttl, worker that is lost, task, note of its error, size, worker that says so
-- -> 'ok', connection to tell, 1 where it is this one that has ended the task
local status, by_this = redis.call('HGET', tasks, ARGV[3]), ARGV[3] .. '=' .. ARGV[6]
if not status then make_past(ARGV[3]) end
if not is_of(ARGV[2], ARGV[3]) then return {'ok', s.conn, is_past(by_this) and 1 or 0} end
local note, text = cjson.decode(ARGV[4]), {}
if s.base <= tonumber(string.match(status, '^%S+ (%S+)')) then
    for _, entry in ipairs(redis.call('XRANGE', log, '-', '+')) do
        local told = cjson.decode(entry[2][2])
        if told[1] == 'text_chunk' and told[2].task_id == ARGV[3] then text[#text + 1] = told[2].chunk end
    end
end
if #text > 0 then note[2].error.data.partial_text = table.concat(text) end
remove(ARGV[3])
make_past(by_this)
redis.call('HDEL', key, 'batch:' .. ARGV[2])
local text_of_note = cjson.encode(note)
add(text_of_note, tonumber(ARGV[5]) + #text_of_note)
save(ARGV[1])
return {'ok', s.conn, 1}
