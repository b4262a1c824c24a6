-- id fence, repeated | Queue again, under no suspicion. Answers how many were handed back.
begin_freeing()
local handed = 0
for at = 1, #ARGV, 2 do
  local id, fence = ARGV[at], ARGV[at + 1]
  local key = job_key(id)
  if holds(key, fence) then
    local job = fields(key, 'owner', 'suspect')
    leave_running(id, job.owner)
    note(key, 'handed-back', job.owner or '')
    queue_again(key, id, job.suspect)
    handed = handed + 1
  end
end
return handed
