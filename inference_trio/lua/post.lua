-- messages: to an inbox, which is forgotten when nobody has renewed it for a minute
for i = 1, #ARGV do redis.call('XADD', KEYS[1], 'MAXLEN', '~', 100000, '*', 'm', ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], 60000)
