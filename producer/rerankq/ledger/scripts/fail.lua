-- id fence ttl channel error_type error | Answers 'failed', or the state that refused it.
begin_freeing()
local id, fence, ttl, channel = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local key = job_key(id)
local job = redis.call('HMGET', key, 'state', 'fence', 'owner')
if job[1] ~= 'running' or job[2] ~= fence then return job[1] or 'unknown' end
leave_running(id, job[3])
redis.call('HSET', key, 'error_type', ARGV[5], 'error', ARGV[6])
finish(key, id, 'failed', ttl, channel)
return 'failed'
