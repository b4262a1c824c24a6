-- id ttl channel | Answers the state that the job is in now.
begin_freeing()
local id, ttl, channel = unpack(ARGV)
local key = job_key(id)
local state = current_state(id, ttl, channel)
if state ~= 'queued' and state ~= 'running' then return state end
local job = fields(key, 'queue', 'tenant', 'pairs', 'owner', 'fence')
if state == 'queued' then
  dequeue(id, job.queue, job.tenant, tonumber(job.pairs))
else
  leave_running(id, job.owner)
  -- With the fence: when a worker receives this, it may hold a newer claim of the same id.
  redis.call('PUBLISH', channel .. ':cancel', id .. ' ' .. job.fence)
end
redis.call('HSET', key, 'error_type', 'JobCancelled', 'error', 'cancelled')
end_job(key, id, 'cancelled', ttl, channel)
return 'cancelled'
