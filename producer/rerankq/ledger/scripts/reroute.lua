-- id fence queue model
-- Queue a job, claimed by a worker of another model, where its own is served. Answers 1, or 0 if it is no longer held.
begin_freeing()
local id, fence, queue, model = unpack(ARGV)
local key = job_key(id)
if not holds(key, fence) then return 0 end
local job = fields(key, 'owner', 'suspect', 'queue', 'tenant', 'claims', 'start_by')
leave_running(id, job.owner)
note(key, 'rerouted', queue)
-- It was not started: its deadline and its order in the queue are as before the claim.
redis.call('HSET', key, 'queue', queue, 'model', model, 'claims', math.max(tonumber(job.claims) - 1, 0),
  'deadline', seconds(job.start_by) and job.start_by or '')
redis.call('HDEL', key, 'started')
queue_again(key, id, job.suspect)
if queue == job.queue then
  -- Two models on one queue: it is sent again when this message counts as lost, not at once, round and round.
  redis.call('ZREM', waiting_key(queue, job.tenant), id)
  redis.call('ZADD', sent_key(queue, job.tenant), stamp(now()), id)
end
return 1
