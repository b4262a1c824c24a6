-- id owner call lease_s ttl channel window unless_suspect
-- Answers {'claimed', fence, suspect, priority, waited_s, payload, more} or {state}; {'deferred', queue, label, priority}
-- of a suspect if unless_suspect = 1: it stays queued, and its message is spent.
-- call: this call's own name, so that one asked again because its answer was lost gets the same answer.
-- more = 1: the queue's window has room for doorbells, refill the window.
begin_freeing()
local id, owner, call, lease_s, ttl, channel, window =
  ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6], tonumber(ARGV[7])
local key = job_key(id)
local state = settle(id, ttl, channel)
local again = state == 'running' and redis.call('HGET', key, 'claim') == call
if state ~= 'queued' and not again then return {state} end

local time = now()
if not again and ARGV[8] == '1' and tonumber(redis.call('HGET', key, 'suspect')) > 0 then
  local job = redis.call('HMGET', key, 'queue', 'label', 'priority', 'tenant')
  -- Whoever deferred it sends the next one; should it not, that one counts as lost some time from now.
  redis.call('ZADD', sent_key(job[1], job[4]), 'XX', stamp(time), id)
  return {'deferred', job[1], job[2] or '', job[3]}
end
if not again then
  take_back(owner)
  local job = redis.call('HMGET', key, 'queue', 'tenant', 'pairs', 'fence', 'claims', 'deadline')
  take_out(id, job[1], job[2], tonumber(job[3]))
  -- By the clock, so that it rises even where the count was lost: over forgetting, submitting again, and a ledger
  -- restored from an older copy no late twin's fence fits again.
  local fence = math.max(tonumber(job[4]) + 1, math.floor(time * 1000000))
  if redis.call('HINCRBY', key, 'claims', 1) > 1 then note(key, 'claimed', owner) end
  redis.call('HSET', key, 'state', 'running', 'owner', owner, 'claim', call, 'fence', string.format('%.0f', fence),
    'started', stamp(time), 'lease_s', lease_s, 'done_pairs', 0,
    -- It has been started in time: queued again after its worker died, it waits for another as long as it takes.
    'deadline', '')
  -- But for a worker that finds it to be of another model: it was not started then.
  if job[6] ~= '' then redis.call('HSET', key, 'start_by', job[6])
  elseif job[5] ~= '0' then redis.call('HDEL', key, 'start_by') end
  redis.call('ZADD', 'rerankq:running', stamp(time + lease_s), id)
end

local job = redis.call('HMGET', key, 'fence', 'suspect', 'priority', 'created', 'payload', 'queue', 'tenant')
local sent, waiting = sent_key(job[6], job[7]), waiting_key(job[6], job[7])
local more = redis.call('ZCARD', sent) * 2 < window and redis.call('EXISTS', waiting) == 1
local waited = math.max(0, time - tonumber(job[4]))
return {'claimed', job[1], tonumber(job[2]), job[3], stamp(waited), job[5] or '', more and 1 or 0}
