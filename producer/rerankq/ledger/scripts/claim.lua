-- id owner lease_s ttl channel window | Answers {'claimed', fence, suspect, priority, waited_s, payload, more} or {state}.
-- more = 1: the queue's window has room for bells, ring on.
begin_freeing()
local id, owner, lease_s, ttl, channel, window = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5], tonumber(ARGV[6])
local key = job_key(id)
local state = settle(id, ttl, channel)
if state ~= 'queued' then return {state} end

local job = redis.call('HMGET', key, 'queue', 'tenant', 'pairs', 'suspect', 'priority', 'created', 'payload')
local queue, tenant = job[1], job[2]
local rung_at = redis.call('ZSCORE', rung_key(queue, tenant), id)
if rung_at then
  -- The newest bell that was answered: bells of this queue that are much older than it are lost.
  local newest = redis.call('HGET', 'rerankq:answered', queue)
  if not newest or tonumber(newest) < tonumber(rung_at) then redis.call('HSET', 'rerankq:answered', queue, rung_at) end
end
take_out(id, queue, tenant, tonumber(job[3]))
local time = now()
local fence = redis.call('HINCRBY', key, 'fence', 1)
redis.call('HINCRBY', key, 'claims', 1)
redis.call('HSET', key, 'state', 'running', 'owner', owner, 'started', stamp(time), 'done_pairs', 0)
redis.call('ZADD', 'rerankq:running', stamp(time + lease_s), id)
local more = 0
if redis.call('ZCARD', rung_key(queue, tenant)) * 2 < window and redis.call('EXISTS', waiting_key(queue, tenant)) == 1 then
  more = 1
end
return {'claimed', fence, tonumber(job[4]), job[5], stamp(time - tonumber(job[6])), job[7], more}
