-- limit then from to, repeated
-- Move queued jobs from queues to which nobody listens to those that serve their model now. Answers how many.
begin_freeing()
local left = tonumber(ARGV[1])
local moved = 0
for at = 2, #ARGV, 2 do
  local from, to = ARGV[at], ARGV[at + 1]
  for _, tenant in ipairs(redis.call('SMEMBERS', tenants_key(from))) do
    for _, line in ipairs({sent_key(from, tenant), waiting_key(from, tenant)}) do
      for _, id in ipairs(left > moved and redis.call('ZRANGE', line, 0, left - moved - 1) or {}) do
        local key = job_key(id)
        local job = written(key) == 'queued' and redis.call('HMGET', key, 'queue', 'pairs', 'deadline') or {}
        redis.call('ZREM', line, id)
        -- Other hands than ours may have changed or removed the record.
        if job[1] == from then
          take_out(id, from, tenant, tonumber(job[2]))
          redis.call('HSET', key, 'queue', to)
          put_in(id, to, tenant, tonumber(job[2]), job[3])
          moved = moved + 1
        end
      end
    end
  end
end
return moved
