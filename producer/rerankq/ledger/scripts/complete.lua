-- id fence ttl channel ranking weights | Answers 'done', or the state that refused it (a late twin's answer is not taken).
begin_freeing()
local id, fence, ttl, channel, ranking = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local key = job_key(id)
if not holds(key, fence) then return written(key) end
local job = redis.call('HMGET', key, 'owner', 'pairs')
leave_running(id, job[1])
-- The payload goes first: in a full ledger it makes room for the ranking.
redis.call('HDEL', key, 'payload')
redis.call('HSET', key, 'ranking', ranking, 'done_pairs', job[2], 'weights', ARGV[6])
finish(key, id, 'done', ttl, channel)
return 'done'
