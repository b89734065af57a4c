-- ttl, task
remove(ARGV[2])
save(ARGV[1])
return {'ok'}
