-- Put before every script of the ledger. Times are seconds by Redis's own clock.
-- Keys of jobs and queues are made here from ids: one server holds them all (no Redis Cluster).
local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local function stamp(time) return string.format('%.6f', time) end
local function job_key(id) return 'rerankq:job:' .. id end
local function of_tenant(key, tenant)
  if tenant == '' then return key end
  return key .. ':' .. tenant
end
local function waiting_key(queue, tenant) return of_tenant('rerankq:waiting:' .. queue, tenant) end
local function sent_key(queue, tenant) return of_tenant('rerankq:sent:' .. queue, tenant) end
local function tenants_key(queue) return 'rerankq:tenants:' .. queue end

-- A full Redis refuses scripts at the first command that may grow memory, unless a writing command
-- came before it. Beginning with one that can only free lets a full ledger drain.
local function begin_freeing() redis.call('HDEL', 'rerankq:backlog', '') end

-- The memory in use with so many bytes more, in percent of the server's limit; 0 where it has none.
local function memory_with(bytes)
  local info = redis.pcall('INFO', 'memory')
  -- Who may not ask is not refused: some hosts forbid INFO.
  if type(info) ~= 'string' then return 0 end
  local limit = tonumber(string.match(info, 'maxmemory:(%d+)') or 0)
  if limit == 0 then return 0 end
  return math.ceil(100 * (tonumber(string.match(info, 'used_memory:(%d+)')) + bytes) / limit)
end

local function count(queue, tenant, pairs_more)
  for _, field in ipairs({'*', queue, queue .. '|' .. tenant}) do
    if redis.call('HINCRBY', 'rerankq:backlog', field, pairs_more) <= 0 then
      redis.call('HDEL', 'rerankq:backlog', field)
    end
  end
end

local function take_out(id, queue, tenant, pairs_in)
  redis.call('ZREM', waiting_key(queue, tenant), id)
  redis.call('ZREM', sent_key(queue, tenant), id)
  redis.call('ZREM', 'rerankq:deadlines', id)
  count(queue, tenant, -pairs_in)
end

-- A job's place in its line: by its age; what was running before, or lost its bell, goes before all others.
local function place(key)
  local job = redis.call('HMGET', key, 'created', 'claims', 'lost')
  return stamp(tonumber(job[1]) - ((tonumber(job[2]) > 0 or job[3]) and 10000000000 or 0))
end

-- The last place of a line: by the time, and behind all others even where the clock was set back since they came.
local function last_place(queue, tenant)
  local last = redis.call('ZREVRANGE', waiting_key(queue, tenant), 0, 0, 'WITHSCORES')[2]
  return stamp(math.max(now(), tonumber(last or 0) + 0.000001))
end

local function put_in(id, queue, tenant, pairs_in, deadline, at)
  redis.call('SADD', 'rerankq:queues', queue)
  redis.call('SADD', tenants_key(queue), tenant)
  redis.call('ZADD', waiting_key(queue, tenant), at or place(job_key(id)), id)
  if deadline ~= '' then redis.call('ZADD', 'rerankq:deadlines', deadline, id) end
  count(queue, tenant, pairs_in)
end

-- Ring at once if the window has room and nobody waits before it: answers 1 if the caller shall send.
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

local function whole(text) return text and #text < 17 and string.match(text, '^%d+$') end
local function seconds(text) return text and #text < 20 and string.match(text, '^%d+%.?%d*$') end

-- What nobody asked to be kept otherwise is kept for so long; most ask for just that, and it is not written down: one
-- field more would make a waiting job's hash 300 bytes larger.
local USUAL_TTL = 3600

-- The longer of two times to live; Redis refuses what is beyond its own clock.
local function longer(ttl, other) return string.format('%.0f', math.min(math.max(ttl, tonumber(other)), 1000000000)) end

local function asked_ttl(key)
  local ttl = redis.call('HGET', key, 'ttl')
  return whole(ttl) and tonumber(ttl) or USUAL_TTL
end

-- What ended is kept for as long as the most patient asked of those who submitted it and of those who end it.
local function finish(key, id, state, ttl, channel)
  ttl = longer(asked_ttl(key), ttl)
  redis.call('HDEL', key, 'owner', 'claim', 'payload')
  redis.call('HSET', key, 'state', state, 'ended', stamp(now()))
  redis.call('EXPIRE', key, ttl)
  redis.call('PUBLISH', channel .. ':job:' .. id, state)
end

-- Whether every field that the scripts count with is there and fit for it. Other hands than ours can write to a record.
local function sound(key)
  local job = redis.call('HMGET', key, 'queue', 'tenant', 'priority', 'created', 'deadline',
    'pairs', 'fence', 'claims', 'deaths', 'suspect', 'done_pairs')
  for at = 6, 11 do
    if not whole(job[at]) then return false end
  end
  return job[1] and job[2] and job[3] and seconds(job[4]) and (job[5] == '' or seconds(job[5]))
end

-- The state of a job as it is written down; 'damaged' where its record cannot be counted with.
local function written(key)
  local kind = redis.call('TYPE', key).ok
  if kind == 'none' then return 'unknown' end
  if kind ~= 'hash' then return 'damaged' end
  local state = redis.call('HGET', key, 'state')
  if not state or (state == 'queued' or state == 'running') and not sound(key) then return 'damaged' end
  return state
end

-- Whether a claim still stands: the job runs, and under this fence.
local function holds(key, fence) return written(key) == 'running' and redis.call('HGET', key, 'fence') == fence end

-- End a job whose record is damaged: one of them must not stop what is done for all.
local function condemn(id, ttl, channel)
  local key = job_key(id)
  redis.call('ZREM', 'rerankq:running', id)
  redis.call('ZREM', 'rerankq:deadlines', id)
  if redis.call('TYPE', key).ok ~= 'hash' then redis.call('DEL', key) end
  local job = redis.call('HMGET', key, 'queue', 'tenant', 'pairs')
  if job[1] and job[2] then
    local waited = redis.call('ZREM', waiting_key(job[1], job[2]), id) + redis.call('ZREM', sent_key(job[1], job[2]), id)
    if waited > 0 and whole(job[3]) then count(job[1], job[2], -tonumber(job[3])) end
  end
  -- What is left of it can be read.
  for _, name in ipairs({'pairs', 'claims', 'done_pairs'}) do
    if not whole(redis.call('HGET', key, name)) then redis.call('HDEL', key, name) end
  end
  for _, name in ipairs({'created', 'started'}) do
    if not seconds(redis.call('HGET', key, name)) then redis.call('HDEL', key, name) end
  end
  redis.call('HSET', key, 'error_type', 'JobFailed', 'error', 'its record in the ledger is damaged; submit it again')
  finish(key, id, 'failed', ttl, channel)
  return 'failed'
end

-- Deadlines hold lazily, so that they hold with no worker alive. Answers the job's state now.
local function settle(id, ttl, channel)
  local key = job_key(id)
  local state = written(key)
  if state == 'damaged' then return condemn(id, ttl, channel) end
  if state ~= 'queued' then return state end
  local job = redis.call('HMGET', key, 'deadline', 'queue', 'tenant', 'pairs')
  if job[1] ~= '' and tonumber(job[1]) <= now() then
    take_out(id, job[2], job[3], tonumber(job[4]))
    redis.call('HSET', key, 'error_type', 'JobExpired', 'error', 'its deadline passed while it was queued')
    finish(key, id, 'expired', ttl, channel)
    return 'expired'
  end
  return state
end

local function leave_running(id, owner)
  redis.call('ZREM', 'rerankq:running', id)
  if owner and redis.call('HGET', 'rerankq:alone', owner) == id then
    redis.call('HDEL', 'rerankq:alone', owner)
  end
end

local function queue_again(key, id, suspect)
  local job = redis.call('HMGET', key, 'queue', 'tenant', 'pairs', 'deadline')
  redis.call('HDEL', key, 'owner', 'claim')
  redis.call('HSET', key, 'state', 'queued', 'suspect', suspect)
  put_in(id, job[1], job[2], tonumber(job[3]), job[4] or '')
end

-- Life. That a lease lapsed is one sign that its worker is gone, its silence the other. On the first the job is queued
-- again at once, accused: a suspect, and where it was alone on the device a death counts. A later sign of life of the same
-- worker, a heartbeat or a claim, takes all that back. The death that would set a job aside waits for the second sign.

-- Seconds of a claim's lease: its owner's own, told when it claimed; *default* for what an older version claimed.
local function lease_of(key, default)
  local lease = seconds(redis.call('HGET', key, 'lease_s'))
  return lease and tonumber(lease) > 0 and tonumber(lease) or default
end

-- Whether a worker is gone by its heartbeat: it signed off, or was found ended, or has been silent for so long.
local function gone(owner, silent_s)
  local entry = redis.call('HGET', 'rerankq:workers', owner)
  local beaten = entry and tonumber(string.match(entry, '^(%S+)') or '')
  return not beaten or beaten <= now() - silent_s
end

local function accused_key(owner) return 'rerankq:accused:' .. owner end

-- Kept for a day: for so long may a worker be paused. '!': its death counts against the job.
local function accuse(owner, id, fence, death)
  redis.call('SADD', accused_key(owner), (death and '!' or '') .. fence .. ' ' .. id)
  redis.call('EXPIRE', accused_key(owner), 86400)
end

-- This worker lives: what was accused because of its silence is not any more.
local function take_back(owner)
  if redis.call('HGET', 'rerankq:alone', owner) == '' then redis.call('HDEL', 'rerankq:alone', owner) end
  local accused = redis.call('SMEMBERS', accused_key(owner))
  if #accused == 0 then return end
  redis.call('DEL', accused_key(owner))
  for _, member in ipairs(accused) do
    local death, fence, id = string.match(member, '^(!?)(%d+) (.*)$')
    death = death == '!'
    local key = job_key(id)
    local state = written(key)
    local open = (state == 'queued' or state == 'running' or state == 'dead') and sound(key)
    -- Of a claim before it was retried: that was forgiven then.
    if open and tonumber(fence) > tonumber(redis.call('HGET', key, 'forgiven') or 0) then
      for _, name in ipairs(death and {'suspect', 'deaths'} or {'suspect'}) do
        if tonumber(redis.call('HGET', key, name)) > 0 then redis.call('HINCRBY', key, name, -1) end
      end
      note(key, 'came-back', owner)
      if death and state == 'dead' then
        redis.call('ZREM', 'rerankq:dead', id)
        redis.call('HDEL', key, 'ended', 'error_type', 'error')
        queue_again(key, id, redis.call('HGET', key, 'suspect'))
      end
    end
  end
end

-- A job that stands nowhere any more (a server that evicts keys, other hands) is put back when somebody asks for it.
local function keep_findable(id, key, state)
  if state == 'running' and not redis.call('ZSCORE', 'rerankq:running', id) then
    begin_freeing()
    redis.call('ZADD', 'rerankq:running', stamp(now() + lease_of(key, 60)), id)
  elseif state == 'dead' and not redis.call('ZSCORE', 'rerankq:dead', id) then
    begin_freeing()
    redis.call('ZADD', 'rerankq:dead', stamp(now()), id)
  elseif state == 'queued' then
    local job = redis.call('HMGET', key, 'queue', 'tenant', 'pairs', 'deadline')
    local queue, tenant = job[1], job[2]
    if not redis.call('ZSCORE', sent_key(queue, tenant), id) and not redis.call('ZSCORE', waiting_key(queue, tenant), id) then
      begin_freeing()
      put_in(id, queue, tenant, tonumber(job[3]), job[4])
    elseif redis.call('SISMEMBER', tenants_key(queue), tenant) == 0 or redis.call('SISMEMBER', 'rerankq:queues', queue) == 0 then
      begin_freeing()
      redis.call('SADD', 'rerankq:queues', queue)
      redis.call('SADD', tenants_key(queue), tenant)
    end
  end
end
