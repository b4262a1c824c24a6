-- id fence queue model
-- Queue a job, claimed by a worker of another model, where its own is served. Answers 1, or 0 if it is no longer held.
begin_freeing()
local id, fence, queue, model = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local key = job_key(id)
if not holds(key, fence) then return 0 end
local job = redis.call('HMGET', key, 'owner', 'suspect', 'queue', 'tenant', 'claims', 'start_by')
leave_running(id, job[1])
note(key, 'rerouted', queue)
-- It was not started: its deadline and its place in line are as before the claim.
redis.call('HSET', key, 'queue', queue, 'model', model, 'claims', math.max(tonumber(job[5]) - 1, 0),
  'deadline', seconds(job[6]) and job[6] or '')
redis.call('HDEL', key, 'started')
queue_again(key, id, job[2])
if queue == job[3] then
  -- Two models on one queue: it is sent again when this message counts as lost, not at once, round and round.
  redis.call('ZREM', waiting_key(queue, job[4]), id)
  redis.call('ZADD', sent_key(queue, job[4]), stamp(now()), id)
end
return 1
