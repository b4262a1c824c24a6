-- window most queue...
-- Take the next jobs of the backlog whose doorbells shall be sent, in turn over tenants.
-- Answers id, queue, label, ahead, repeated. ahead = 1: the job ran before, or lost its doorbell. It is sent even if the
-- window is full, and its doorbell overtakes the others.
begin_freeing()
local window, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local answer = {}
local turn = redis.call('INCR', KEY.turn)
for at = 3, #ARGV do
  local queue = ARGV[at]
  local tenants = redis.call('SMEMBERS', tenants_key(queue))
  table.sort(tenants)
  local taken, idle = 0, 0
  while #tenants > 0 and idle < #tenants and taken < most do
    local tenant = tenants[turn % #tenants + 1]
    turn = turn + 1
    local waiting, sent = waiting_key(queue, tenant), sent_key(queue, tenant)
    local again = redis.call('ZCOUNT', waiting, '-inf', '(0')
    local room = math.min(math.max(window - redis.call('ZCARD', sent), again), most - taken, 16)
    local popped = room > 0 and redis.call('ZPOPMIN', waiting, room) or {}
    if #popped == 0 then idle = idle + 1 else idle = 0 end
    for index = 1, #popped, 2 do
      local id, order = popped[index], tonumber(popped[index + 1])
      redis.call('ZADD', sent, stamp(now()), id)
      local label = redis.pcall('HGET', job_key(id), 'label')
      for _, part in ipairs({id, queue, type(label) == 'string' and label or '', order < 0 and 1 or 0}) do
        answer[#answer + 1] = part
      end
      taken = taken + 1
    end
    if #popped == 0 and redis.call('EXISTS', waiting) == 0 and redis.call('EXISTS', sent) == 0 then
      redis.call('SREM', tenants_key(queue), tenant)
      -- If a record was removed from outside, nobody knew how many pairs went with it: here it is known that none are left.
      local left = tonumber(redis.call('HGET', KEY.backlog, queue .. '|' .. tenant) or '')
      if left then count_waiting(queue, tenant, -left) end
    end
  end
end
return answer
