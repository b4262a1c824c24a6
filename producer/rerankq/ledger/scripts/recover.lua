-- worker max_attempts channel then id fence, repeated
-- This worker has ended: no machine runs such a process any more. What it held waits for no lease. The claims that are named
-- only waited when it ended: they are queued again under no suspicion, each job so often at most. All others are suspects.
-- Answers {queued again unsuspected, suspects, dead}.
begin_freeing()
local worker, max_attempts, channel = ARGV[1], tonumber(ARGV[2]), ARGV[3]
redis.call('HDEL', KEY.workers, worker)
-- It never comes back: no suspicion that it left is taken back.
redis.call('DEL', accused_key(worker))
local waited = {}
for at = 4, #ARGV, 2 do waited[ARGV[at + 1] .. ' ' .. ARGV[at]] = true end
local alone = redis.call('HGET', KEY.alone, worker) or nil
local spared, suspects, dead = 0, 0, 0

-- Whether a job that only waited is spared once more. Counted, for a job may end its worker later than its batch: it
-- would never be found.
local function spare(key)
  local times = redis.call('HGET', key, 'spared') or '0'
  if not whole(times) or tonumber(times) >= POLICY.spared_at_most then return false end
  redis.call('HSET', key, 'spared', tonumber(times) + 1)
  return true
end

for _, id in ipairs(redis.call('ZRANGE', KEY.running, 0, -1)) do
  local key = job_key(id)
  if redis.pcall('HGET', key, 'owner') == worker and stored_state(key) == 'running' then
    local job = fields(key, 'owner', 'suspect', 'deaths', 'fence')
    if not alone and waited[job.fence .. ' ' .. id] and spare(key) then
      redis.call('ZREM', KEY.running, id)
      note(key, 'spared', worker)
      queue_again(key, id, job.suspect)
      spared = spared + 1
    else
      note(key, 'worker-ended', worker)
      if requeue_lost(id, key, job, alone, max_attempts, channel, false) then dead = dead + 1
      elseif alone and alone ~= id then spared = spared + 1
      else suspects = suspects + 1 end
    end
  end
end
redis.call('HDEL', KEY.alone, worker)
return {spared, suspects, dead}
