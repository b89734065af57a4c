-- -> the era that it is
return redis.call('HGET', KEYS[1], 'era')
