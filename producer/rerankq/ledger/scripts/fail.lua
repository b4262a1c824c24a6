-- id fence ttl channel error_type error | Answers 'failed', or the state that refused it.
begin_freeing()
local id, fence, ttl, channel = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local key = job_key(id)
if not holds(key, fence) then return written(key) end
leave_running(id, redis.call('HGET', key, 'owner'))
redis.call('HSET', key, 'error_type', ARGV[5], 'error', ARGV[6])
finish(key, id, 'failed', ttl, channel)
return 'failed'
