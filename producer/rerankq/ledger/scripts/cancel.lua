-- id ttl channel | Answers the state that the job is in now.
begin_freeing()
local id, ttl, channel = ARGV[1], ARGV[2], ARGV[3]
local key = job_key(id)
local state = settle(id, ttl, channel)
if state ~= 'queued' and state ~= 'running' then return state end
local job = redis.call('HMGET', key, 'queue', 'tenant', 'pairs', 'owner', 'fence')
if state == 'queued' then
  take_out(id, job[1], job[2], tonumber(job[3]))
else
  leave_running(id, job[4])
  -- With the fence: by the time a worker hears of it, it may hold a newer claim of the same id.
  redis.call('PUBLISH', channel .. ':cancel', id .. ' ' .. job[5])
end
redis.call('HSET', key, 'error_type', 'JobCancelled', 'error', 'cancelled')
finish(key, id, 'cancelled', ttl, channel)
return 'cancelled'
