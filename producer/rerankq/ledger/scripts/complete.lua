-- id fence ttl channel ranking weights | Answers 'done', or the state that refused it (the claim is not the newest).
begin_freeing()
local id, fence, ttl, channel, ranking, weights = unpack(ARGV)
local key = job_key(id)
if not holds(key, fence) then return stored_state(key) end
local job = fields(key, 'owner', 'pairs')
leave_running(id, job.owner)
-- The payload goes first: in a full ledger it makes room for the ranking.
redis.call('HDEL', key, 'payload')
redis.call('HSET', key, 'ranking', ranking, 'done_pairs', job.pairs, 'weights', weights)
end_job(key, id, 'done', ttl, channel)
return 'done'
