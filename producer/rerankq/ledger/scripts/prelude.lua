-- Stands before every script of the ledger. Times are seconds by Redis's own clock.
-- KEY and POLICY come before this, written by keys.py and lease_policy.py.
-- Keys of jobs and queues are made here from ids: one server holds them all (no Redis Cluster).
local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local function stamp(time) return string.format('%.6f', time) end
local function job_key(id) return KEY.job .. ':' .. id end
local function of_tenant(key, tenant)
  if tenant == '' then return key end
  return key .. ':' .. tenant
end
local function waiting_key(queue, tenant) return of_tenant(KEY.waiting .. ':' .. queue, tenant) end
local function sent_key(queue, tenant) return of_tenant(KEY.sent .. ':' .. queue, tenant) end
local function tenants_key(queue) return KEY.tenants .. ':' .. queue end

-- Fields of a hash, by their names; nil where there is none.
local function fields(key, ...)
  local names, values, found = {...}, redis.call('HMGET', key, ...), {}
  for at = 1, #names do found[names[at]] = values[at] or nil end
  return found
end

-- A full Redis refuses scripts at the first command that may grow memory, unless a writing command
-- came before it. Beginning with one that can only free lets a full ledger drain.
local function begin_freeing() redis.call('HDEL', KEY.backlog, '') end

-- The memory in use with so many bytes more, in percent of the server's limit; 0 where it has none.
local function memory_with(bytes)
  local info = redis.pcall('INFO', 'memory')
  -- Some hosts forbid INFO: then nothing is refused.
  if type(info) ~= 'string' then return 0 end
  local limit = tonumber(string.match(info, 'maxmemory:(%d+)') or 0)
  if limit == 0 then return 0 end
  return math.ceil(100 * (tonumber(string.match(info, 'used_memory:(%d+)')) + bytes) / limit)
end

local function count_waiting(queue, tenant, pairs_more)
  for _, field in ipairs({'*', queue, queue .. '|' .. tenant}) do
    if redis.call('HINCRBY', KEY.backlog, field, pairs_more) <= 0 then
      redis.call('HDEL', KEY.backlog, field)
    end
  end
end

local function dequeue(id, queue, tenant, pairs_in)
  redis.call('ZREM', waiting_key(queue, tenant), id)
  redis.call('ZREM', sent_key(queue, tenant), id)
  redis.call('ZREM', KEY.deadlines, id)
  count_waiting(queue, tenant, -pairs_in)
end

-- By what the waiting jobs of a queue are ordered: their age; a job that ran before, or lost its doorbell, goes first.
local function order_of(key)
  local job = fields(key, 'created', 'claims', 'lost')
  return stamp(tonumber(job.created) - ((tonumber(job.claims) > 0 or job.lost) and 10000000000 or 0))
end

-- The end of that order: the time now, and after all others even if the clock was set back since they came.
local function order_of_newest(queue, tenant)
  local newest = redis.call('ZREVRANGE', waiting_key(queue, tenant), 0, 0, 'WITHSCORES')[2]
  return stamp(math.max(now(), tonumber(newest or 0) + 0.000001))
end

local function enqueue(id, queue, tenant, pairs_in, deadline, order)
  redis.call('SADD', KEY.queues, queue)
  redis.call('SADD', tenants_key(queue), tenant)
  redis.call('ZADD', waiting_key(queue, tenant), order or order_of(job_key(id)), id)
  if deadline ~= '' then redis.call('ZADD', KEY.deadlines, deadline, id) end
  count_waiting(queue, tenant, pairs_in)
end

-- Answers 1 if the caller shall send a doorbell at once: the window has room, and no job waits before this one.
local function may_send(id, queue, tenant, window)
  local waiting = waiting_key(queue, tenant)
  local sent = sent_key(queue, tenant)
  if redis.call('ZCARD', sent) >= window or redis.call('ZRANK', waiting, id) ~= 0 then return 0 end
  redis.call('ZREM', waiting, id)
  redis.call('ZADD', sent, stamp(now()), id)
  return 1
end

local function note(key, event, detail)
  local history = redis.call('HGET', key, 'history') or ''
  if #history < 4096 then
    redis.call('HSET', key, 'history', history .. stamp(now()) .. ' ' .. event .. ' ' .. detail .. '\n')
  end
end

-- Tell that a job has ended: whoever waits, and the gateway that looks at webhooks next. It looks now and then anyway,
-- and a user of Redis from before there were webhooks may not write that key: no reason to fail.
local function tell_ended(id, state, channel)
  redis.call('PUBLISH', channel .. ':job:' .. id, state)
  redis.pcall('ZADD', KEY.webhooks, 'XX', stamp(now()), id)
end

local function whole(text) return text and #text < 17 and string.match(text, '^%d+$') end
local function seconds(text) return text and #text < 20 and string.match(text, '^%d+%.?%d*$') end

-- How long an ended job is kept unless somebody asked for longer. Most ask for just that, and it is not written down:
-- one field more would make a waiting job's hash 300 bytes larger.
local USUAL_TTL = 3600

-- The longer of two times to live; Redis refuses what is beyond its own clock.
local function longer(ttl, other) return string.format('%.0f', math.min(math.max(ttl, tonumber(other)), 1000000000)) end

local function asked_ttl(key)
  local ttl = redis.call('HGET', key, 'ttl')
  return whole(ttl) and tonumber(ttl) or USUAL_TTL
end

-- An ended job is kept for the longest time that anybody asked for who submitted or ended it.
local function end_job(key, id, state, ttl, channel)
  ttl = longer(asked_ttl(key), ttl)
  redis.call('HDEL', key, 'owner', 'claim', 'payload')
  redis.call('HSET', key, 'state', state, 'ended', stamp(now()))
  redis.call('EXPIRE', key, ttl)
  tell_ended(id, state, channel)
end

-- Whether every field that the scripts count with is there and is a number. Anybody who may write here can damage a record.
local function intact(key)
  local job = fields(key, 'queue', 'tenant', 'priority', 'created', 'deadline',
    'pairs', 'fence', 'claims', 'deaths', 'suspect', 'done_pairs')
  return job.queue and job.tenant and job.priority and seconds(job.created)
    and (job.deadline == '' or seconds(job.deadline)) and whole(job.pairs) and whole(job.fence)
    and whole(job.claims) and whole(job.deaths) and whole(job.suspect) and whole(job.done_pairs)
end

-- The state of a job as it is written down; 'damaged' if its record cannot be counted with.
local function stored_state(key)
  local kind = redis.call('TYPE', key).ok
  if kind == 'none' then return 'unknown' end
  if kind ~= 'hash' then return 'damaged' end
  local state = redis.call('HGET', key, 'state')
  if not state or (state == 'queued' or state == 'running') and not intact(key) then return 'damaged' end
  return state
end

-- Whether a claim still stands: the job runs, and under this fence.
local function holds(key, fence) return stored_state(key) == 'running' and redis.call('HGET', key, 'fence') == fence end

-- End a job whose record is damaged: one of them must not stop what is done for all.
local function fail_damaged(id, ttl, channel)
  local key = job_key(id)
  redis.call('ZREM', KEY.running, id)
  redis.call('ZREM', KEY.deadlines, id)
  if redis.call('TYPE', key).ok ~= 'hash' then redis.call('DEL', key) end
  local job = fields(key, 'queue', 'tenant', 'pairs')
  if job.queue and job.tenant then
    local waited = redis.call('ZREM', waiting_key(job.queue, job.tenant), id)
      + redis.call('ZREM', sent_key(job.queue, job.tenant), id)
    if waited > 0 and whole(job.pairs) then count_waiting(job.queue, job.tenant, -tonumber(job.pairs)) end
  end
  -- What is left of it can be read.
  for _, name in ipairs({'pairs', 'claims', 'done_pairs'}) do
    if not whole(redis.call('HGET', key, name)) then redis.call('HDEL', key, name) end
  end
  for _, name in ipairs({'created', 'started'}) do
    if not seconds(redis.call('HGET', key, name)) then redis.call('HDEL', key, name) end
  end
  redis.call('HSET', key, 'error_type', 'JobFailed', 'error', 'its record in the ledger is damaged; submit it again')
  end_job(key, id, 'failed', ttl, channel)
  return 'failed'
end

-- Answers the job's state now. Deadlines are checked here, so that they hold with no worker alive.
local function current_state(id, ttl, channel)
  local key = job_key(id)
  local state = stored_state(key)
  if state == 'damaged' then return fail_damaged(id, ttl, channel) end
  if state ~= 'queued' then return state end
  local job = fields(key, 'deadline', 'queue', 'tenant', 'pairs')
  if job.deadline ~= '' and tonumber(job.deadline) <= now() then
    dequeue(id, job.queue, job.tenant, tonumber(job.pairs))
    redis.call('HSET', key, 'error_type', 'JobExpired', 'error', 'its deadline passed while it was queued')
    end_job(key, id, 'expired', ttl, channel)
    return 'expired'
  end
  return state
end

local function leave_running(id, owner)
  redis.call('ZREM', KEY.running, id)
  if owner and redis.call('HGET', KEY.alone, owner) == id then
    redis.call('HDEL', KEY.alone, owner)
  end
end

local function queue_again(key, id, suspect)
  local job = fields(key, 'queue', 'tenant', 'pairs', 'deadline')
  redis.call('HDEL', key, 'owner', 'claim')
  redis.call('HSET', key, 'state', 'queued', 'suspect', suspect)
  enqueue(id, job.queue, job.tenant, tonumber(job.pairs), job.deadline or '')
end

-- Life. That a lease lapsed is one sign that its worker is gone, its silence the other. On the first the job is queued
-- again at once, accused: a suspect, and if it was alone on the device a death counts. A later sign of life of the same
-- worker, a heartbeat or a claim, takes all that back. The death that would set a job aside waits for the second sign.

-- Seconds of a claim's lease: its owner's own, stored when it claimed; *default* for what an older version claimed.
local function lease_of(key, default)
  local lease = seconds(redis.call('HGET', key, 'lease_s'))
  return lease and tonumber(lease) > 0 and tonumber(lease) or default
end

-- Whether a worker of such leases is gone by its heartbeat: it signed off, or was found ended, or is silent for too long.
local function gone(owner, lease)
  local entry = redis.call('HGET', KEY.workers, owner)
  local beat_at = entry and tonumber(string.match(entry, '^(%S+)') or '')
  return not beat_at or beat_at <= now() - math.max(POLICY.alive_least_s, POLICY.alive_leases * lease)
end

local function accused_key(owner) return KEY.accused .. ':' .. owner end

-- Kept for as long as a worker may be paused. '!': its death counts against the job.
local function accuse(owner, id, fence, death)
  redis.call('SADD', accused_key(owner), (death and '!' or '') .. fence .. ' ' .. id)
  redis.call('EXPIRE', accused_key(owner), POLICY.accused_kept_s)
end

-- Queue a running job again that its worker will not finish; answers whether it is dead instead.
-- job: its owner, suspect, deaths and fence. alone: which job its worker had alone on the device; '' if there was one, nil
-- if there was none. may_return: its worker may turn out to live, so what is counted here can be taken back.
local function requeue_lost(id, key, job, alone, max_attempts, channel, may_return)
  local owner = job.owner or ''
  redis.call('ZREM', KEY.running, id)
  -- Another job was alone on that device: this one is innocent.
  if alone and alone ~= id then queue_again(key, id, job.suspect) return false end
  if may_return then accuse(owner, id, job.fence, alone == id) end
  if not alone then queue_again(key, id, job.suspect + 1) return false end
  -- It was alone on the device when its worker died: this death counts. That there was one alone stays known, for the
  -- jobs that were parked beside it.
  redis.call('HSET', KEY.alone, owner, '')
  local deaths = redis.call('HINCRBY', key, 'deaths', 1)
  if deaths < max_attempts then queue_again(key, id, job.suspect + 1) return false end
  redis.call('HDEL', key, 'owner', 'claim')
  redis.call('HSET', key, 'state', 'dead', 'suspect', job.suspect + 1, 'ended', stamp(now()), 'error_type', 'JobDead',
    'error', 'its worker died ' .. deaths .. ' times while alone with it')
  redis.call('PERSIST', key)
  redis.call('ZADD', KEY.dead, stamp(now()), id)
  tell_ended(id, 'dead', channel)
  return true
end

-- This worker lives: its jobs that were accused because of its silence are cleared.
local function clear_accused(owner)
  if redis.call('HGET', KEY.alone, owner) == '' then redis.call('HDEL', KEY.alone, owner) end
  local accused = redis.call('SMEMBERS', accused_key(owner))
  if #accused == 0 then return end
  redis.call('DEL', accused_key(owner))
  for _, member in ipairs(accused) do
    local death, fence, id = string.match(member, '^(!?)(%d+) (.*)$')
    death = death == '!'
    local key = job_key(id)
    local state = stored_state(key)
    local open = (state == 'queued' or state == 'running' or state == 'dead') and intact(key)
    -- Not of a claim before somebody retried the job: that was forgiven then.
    if open and tonumber(fence) > tonumber(redis.call('HGET', key, 'forgiven') or 0) then
      for _, name in ipairs(death and {'suspect', 'deaths'} or {'suspect'}) do
        if tonumber(redis.call('HGET', key, name)) > 0 then redis.call('HINCRBY', key, name, -1) end
      end
      note(key, 'came-back', owner)
      if death and state == 'dead' then
        redis.call('ZREM', KEY.dead, id)
        redis.call('HDEL', key, 'ended', 'error_type', 'error')
        queue_again(key, id, redis.call('HGET', key, 'suspect'))
      end
    end
  end
end

-- A job that is in no index any more (the server evicts keys, or somebody removed some) is put back when it is asked for.
local function restore_to_index(id, key, state)
  if state == 'running' and not redis.call('ZSCORE', KEY.running, id) then
    begin_freeing()
    redis.call('ZADD', KEY.running, stamp(now() + lease_of(key, 60)), id)
  elseif state == 'dead' and not redis.call('ZSCORE', KEY.dead, id) then
    begin_freeing()
    redis.call('ZADD', KEY.dead, stamp(now()), id)
  elseif state == 'queued' then
    local job = fields(key, 'queue', 'tenant', 'pairs', 'deadline')
    local queue, tenant = job.queue, job.tenant
    if not redis.call('ZSCORE', sent_key(queue, tenant), id) and not redis.call('ZSCORE', waiting_key(queue, tenant), id) then
      begin_freeing()
      enqueue(id, queue, tenant, tonumber(job.pairs), job.deadline)
    elseif redis.call('SISMEMBER', tenants_key(queue), tenant) == 0 or redis.call('SISMEMBER', KEY.queues, queue) == 0 then
      begin_freeing()
      redis.call('SADD', KEY.queues, queue)
      redis.call('SADD', tenants_key(queue), tenant)
    end
  end
end

local function webhook_key(id) return KEY.webhook .. ':' .. id end

-- Put a job's webhooks where the soonest of them belongs in the line; false if none waits to be delivered.
local function plan_webhooks(id)
  local found, soonest = redis.call('HGETALL', webhook_key(id)), nil
  for at = 1, #found, 2 do
    if string.find(found[at], '|next', 1, true) then
      local next_at = tonumber(found[at + 1]) or 0
      if not soonest or next_at < soonest then soonest = next_at end
    end
  end
  if soonest then redis.call('ZADD', KEY.webhooks, stamp(soonest), id) else redis.call('ZREM', KEY.webhooks, id) end
  return soonest ~= nil
end
