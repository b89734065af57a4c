-- owner, most requests a minute -> 'ok', or 'rate' and seconds to wait
local wait = spend(ARGV[1], ARGV[2])
return wait and {'rate', wait} or {'ok'}
