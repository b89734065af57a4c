-- digest -> whether it was the ticket's
if redis.call('GET', KEYS[1] .. ':ticket') ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1] .. ':ticket')
