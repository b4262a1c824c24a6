-- id fence, repeated | Queue again, under no suspicion. Answers how many were handed back.
begin_freeing()
local handed = 0
for at = 1, #ARGV, 2 do
  local id = ARGV[at]
  local key = job_key(id)
  local job = redis.call('HMGET', key, 'state', 'fence', 'owner', 'suspect')
  if job[1] == 'running' and job[2] == ARGV[at + 1] then
    leave_running(id, job[3])
    note(key, 'handed-back', job[3])
    queue_again(key, id, job[4])
    handed = handed + 1
  end
end
return handed
