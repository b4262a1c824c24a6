-- id fence ttl channel error_type error | Answers 'failed', or the state that refused it.
begin_freeing()
local id, fence, ttl, channel, error_type, error = unpack(ARGV)
local key = job_key(id)
if not holds(key, fence) then return stored_state(key) end
leave_running(id, redis.call('HGET', key, 'owner'))
redis.call('HSET', key, 'error_type', error_type, 'error', error)
end_job(key, id, 'failed', ttl, channel)
return 'failed'
