-- window most queue... | Ring on from the backlog, in turn over tenants. Answers id, queue, label, ahead, repeated.
-- ahead = 1: the job was running before, or lost its bell. It is sent for whatever the window says, and its doorbell overtakes the others.
begin_freeing()
local window, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local answer = {}
local turn = redis.call('INCR', 'rerankq:turn')
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
      local id = popped[index]
      redis.call('ZADD', sent, stamp(now()), id)
      answer[#answer + 1] = id
      answer[#answer + 1] = queue
      local label = redis.pcall('HGET', job_key(id), 'label')
      answer[#answer + 1] = type(label) == 'string' and label or ''
      answer[#answer + 1] = tonumber(popped[index + 1]) < 0 and 1 or 0
      taken = taken + 1
    end
    if #popped == 0 and redis.call('EXISTS', waiting) == 0 and redis.call('EXISTS', sent) == 0 then
      redis.call('SREM', tenants_key(queue), tenant)
      -- Nobody knew how many pairs went with a record that other hands removed: here it is known that none are left.
      local left = tonumber(redis.call('HGET', 'rerankq:backlog', queue .. '|' .. tenant) or '')
      if left then count(queue, tenant, -left) end
    end
  end
end
return answer
