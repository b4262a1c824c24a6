-- id fence, repeated | Queue again, under no suspicion. Answers how many were handed back.
begin_freeing()
local handed = 0
for at = 1, #ARGV, 2 do
  local id = ARGV[at]
  local key = job_key(id)
  if holds(key, ARGV[at + 1]) then
    local job = redis.call('HMGET', key, 'owner', 'suspect')
    leave_running(id, job[1])
    note(key, 'handed-back', job[1] or '')
    queue_again(key, id, job[2])
    handed = handed + 1
  end
end
return handed
