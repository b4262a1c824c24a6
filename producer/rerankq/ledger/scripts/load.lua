-- Reads only. Answers the time now, the jobs running and dead, and for each queue with jobs {queue, jobs waiting, pairs,
-- tenants, when the oldest was accepted}. A job that is queued again counts as old as it is.
local answer = {stamp(now()), redis.call('ZCARD', KEY.running), redis.call('ZCARD', KEY.dead)}
for _, queue in ipairs(redis.call('SMEMBERS', KEY.queues)) do
  local jobs, tenants, oldest = 0, 0, nil
  for _, tenant in ipairs(redis.call('SMEMBERS', tenants_key(queue))) do
    local counted = 0
    for _, key in ipairs({waiting_key(queue, tenant), sent_key(queue, tenant)}) do
      counted = counted + redis.call('ZCARD', key)
      for _, id in ipairs(redis.call('ZRANGE', key, 0, 0)) do
        if stored_state(job_key(id)) == 'queued' then
          local created = tonumber(fields(job_key(id), 'created').created)
          if not oldest or created < oldest then oldest = created end
        end
      end
    end
    jobs = jobs + counted
    if counted > 0 then tenants = tenants + 1 end
  end
  if jobs > 0 then
    answer[#answer + 1] =
      {queue, jobs, redis.call('HGET', KEY.backlog, queue) or '0', tenants, oldest and stamp(oldest) or ''}
  end
end
return answer
