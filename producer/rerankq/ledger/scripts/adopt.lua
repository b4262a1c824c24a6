-- limit then from to, repeated
-- Move queued jobs from queues that no worker serves to those that serve their model now. Answers how many.
begin_freeing()
local left = tonumber(ARGV[1])
local moved = 0
for at = 2, #ARGV, 2 do
  local from, to = ARGV[at], ARGV[at + 1]
  for _, tenant in ipairs(redis.call('SMEMBERS', tenants_key(from))) do
    for _, index in ipairs({sent_key(from, tenant), waiting_key(from, tenant)}) do
      for _, id in ipairs(left > moved and redis.call('ZRANGE', index, 0, left - moved - 1) or {}) do
        local key = job_key(id)
        local job = stored_state(key) == 'queued' and fields(key, 'queue', 'pairs', 'deadline') or {}
        redis.call('ZREM', index, id)
        -- Not if something else changed or removed the record.
        if job.queue == from then
          dequeue(id, from, tenant, tonumber(job.pairs))
          redis.call('HSET', key, 'queue', to)
          enqueue(id, to, tenant, tonumber(job.pairs), job.deadline)
          moved = moved + 1
        end
      end
    end
  end
end
return moved
