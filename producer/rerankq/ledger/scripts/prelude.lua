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
local function rung_key(queue, tenant) return of_tenant('rerankq:rung:' .. queue, tenant) end
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
  redis.call('ZREM', rung_key(queue, tenant), id)
  redis.call('ZREM', 'rerankq:deadlines', id)
  count(queue, tenant, -pairs_in)
end

local function put_in(id, queue, tenant, pairs_in, created, deadline)
  redis.call('SADD', 'rerankq:queues', queue)
  redis.call('SADD', tenants_key(queue), tenant)
  redis.call('ZADD', waiting_key(queue, tenant), created, id)
  if deadline ~= '' then redis.call('ZADD', 'rerankq:deadlines', deadline, id) end
  count(queue, tenant, pairs_in)
end

-- Ring at once if the window has room and nobody waits before it: answers 1 if the caller shall ring.
local function may_ring(id, queue, tenant, window)
  local waiting = waiting_key(queue, tenant)
  local rung = rung_key(queue, tenant)
  if redis.call('ZCARD', rung) >= window or redis.call('ZRANK', waiting, id) ~= 0 then return 0 end
  redis.call('ZREM', waiting, id)
  redis.call('ZADD', rung, stamp(now()), id)
  return 1
end

local function note(key, event, detail)
  local history = redis.call('HGET', key, 'history') or ''
  if #history < 4096 then
    redis.call('HSET', key, 'history', history .. stamp(now()) .. ' ' .. event .. ' ' .. detail .. '\n')
  end
end

local function finish(key, id, state, ttl, channel)
  redis.call('HDEL', key, 'owner', 'claim', 'payload')
  redis.call('HSET', key, 'state', state, 'ended', stamp(now()))
  redis.call('EXPIRE', key, ttl)
  redis.call('PUBLISH', channel .. ':job:' .. id, state)
end

-- Deadlines hold lazily, so that they hold with no worker alive. Answers the job's state now.
local function settle(id, ttl, channel)
  local key = job_key(id)
  local job = redis.call('HMGET', key, 'state', 'deadline', 'queue', 'tenant', 'pairs')
  if job[1] == 'queued' and job[2] and job[2] ~= '' and tonumber(job[2]) <= now() then
    take_out(id, job[3], job[4], tonumber(job[5]))
    redis.call('HSET', key, 'error_type', 'JobExpired', 'error', 'its deadline passed while it was queued')
    finish(key, id, 'expired', ttl, channel)
    return 'expired'
  end
  return job[1] or 'unknown'
end

local function leave_running(id, owner)
  redis.call('ZREM', 'rerankq:running', id)
  if owner and redis.call('HGET', 'rerankq:alone', owner) == id then
    redis.call('HDEL', 'rerankq:alone', owner)
  end
end

local function queue_again(key, id, suspect)
  local job = redis.call('HMGET', key, 'queue', 'tenant', 'pairs', 'created', 'deadline')
  redis.call('HDEL', key, 'owner', 'claim')
  redis.call('HSET', key, 'state', 'queued', 'suspect', suspect)
  put_in(id, job[1], job[2], tonumber(job[3]), job[4], job[5] or '')
end
