-- id owner call lease_s ttl channel window unless_suspect
-- Answers {'claimed', fence, suspect, priority, waited_s, payload, more} or {state}; {'deferred', queue, label, priority}
-- of a suspect if unless_suspect = 1: it stays queued, and its doorbell is used up.
-- call: this call's own name, so that one asked again because its answer was lost gets the same answer.
-- more = 1: the queue's window has room for doorbells, refill the window.
begin_freeing()
local id, owner, call, lease_s, ttl, channel, window, unless_suspect = unpack(ARGV)
lease_s, window = tonumber(lease_s), tonumber(window)
local key = job_key(id)
local state = current_state(id, ttl, channel)
local again = state == 'running' and redis.call('HGET', key, 'claim') == call
if state ~= 'queued' and not again then return {state} end

local time = now()
if not again and unless_suspect == '1' and tonumber(redis.call('HGET', key, 'suspect')) > 0 then
  local job = fields(key, 'queue', 'label', 'priority', 'tenant')
  -- The worker that deferred it sends the next doorbell; if it does not, that one counts as lost some time from now.
  redis.call('ZADD', sent_key(job.queue, job.tenant), 'XX', stamp(time), id)
  return {'deferred', job.queue, job.label or '', job.priority}
end
if not again then
  clear_accused(owner)
  local job = fields(key, 'queue', 'tenant', 'pairs', 'fence', 'claims', 'deadline')
  dequeue(id, job.queue, job.tenant, tonumber(job.pairs))
  -- By the clock, so that it rises even if the count was lost: after forgetting, submitting again, or restoring the
  -- ledger from an older copy, no earlier fence is valid again.
  local fence = math.max(tonumber(job.fence) + 1, math.floor(time * 1000000))
  if redis.call('HINCRBY', key, 'claims', 1) > 1 then note(key, 'claimed', owner) end
  redis.call('HSET', key, 'state', 'running', 'owner', owner, 'claim', call, 'fence', string.format('%.0f', fence),
    'started', stamp(time), 'lease_s', lease_s, 'done_pairs', 0,
    -- It has been started in time: queued again after its worker died, it waits for another as long as it takes.
    'deadline', '')
  -- But for a worker that finds it to be of another model: it was not started then.
  if job.deadline ~= '' then redis.call('HSET', key, 'start_by', job.deadline)
  elseif job.claims ~= '0' then redis.call('HDEL', key, 'start_by') end
  redis.call('ZADD', KEY.running, stamp(time + lease_s), id)
end

local job = fields(key, 'fence', 'suspect', 'priority', 'created', 'payload', 'queue', 'tenant')
local sent, waiting = sent_key(job.queue, job.tenant), waiting_key(job.queue, job.tenant)
local more = redis.call('ZCARD', sent) * 2 < window and redis.call('EXISTS', waiting) == 1
local waited = math.max(0, time - tonumber(job.created))
return {'claimed', job.fence, tonumber(job.suspect), job.priority, stamp(waited), job.payload or '', more and 1 or 0}
