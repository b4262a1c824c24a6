-- sweeper judge max_attempts ttl channel limit grace_s then queue free_since, repeated
-- Judge lapsed leases, expire, and take back lost bells so that they are rung again.
-- Answers {lapsed, dead, expired, bells taken back}, or {} where another sweeper holds the lock.
begin_freeing()
local lock = redis.call('GET', 'rerankq:sweeper')
if lock and lock ~= ARGV[1] then return {} end
redis.call('SET', 'rerankq:sweeper', ARGV[1], 'PX', 3000)
local judge, max_attempts, ttl, channel = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local limit, grace = tonumber(ARGV[6]), tonumber(ARGV[7])
local time = now()
local lapsed, dead, expired, bells = 0, 0, 0, 0

local function judge_lapsed(id)
  local key = job_key(id)
  local job = redis.call('HMGET', key, 'owner', 'suspect')
  local owner = job[1] or ''
  local alone = redis.call('HGET', 'rerankq:alone', owner)
  note(key, 'lease-over', owner)
  lapsed = lapsed + 1
  -- Another job was alone on that device: this one is innocent.
  if alone and alone ~= id then return queue_again(key, id, job[2]) end
  if not alone then return queue_again(key, id, 1) end
  -- It was alone on the device when its worker died: this death counts. That there was one alone stays known, for the
  -- jobs that were parked beside it.
  redis.call('HSET', 'rerankq:alone', owner, '')
  local deaths = redis.call('HINCRBY', key, 'deaths', 1)
  if deaths < max_attempts then return queue_again(key, id, 1) end
  dead = dead + 1
  redis.call('HDEL', key, 'owner', 'claim')
  redis.call('HSET', key, 'state', 'dead', 'ended', stamp(time), 'error_type', 'JobDead',
    'error', 'its worker died ' .. deaths .. ' times while alone with it')
  redis.call('PERSIST', key)
  redis.call('ZADD', 'rerankq:dead', stamp(time), id)
  redis.call('PUBLISH', channel .. ':job:' .. id, 'dead')
end

if judge == '1' then
  local over = redis.call('ZRANGEBYSCORE', 'rerankq:running', '-inf', stamp(time), 'LIMIT', 0, limit)
  for _, id in ipairs(over) do
    redis.call('ZREM', 'rerankq:running', id)
    if settle(id, ttl, channel) == 'running' then judge_lapsed(id) end
  end
  if #over < limit then
    -- All leases that were over are judged: what gone workers had alone has served.
    local alone = redis.call('HGETALL', 'rerankq:alone')
    for at = 1, #alone, 2 do
      local owner = alone[at]
      local holds = redis.pcall('HGET', job_key(alone[at + 1]), 'owner') == owner
      if not holds and redis.call('HEXISTS', 'rerankq:workers', owner) == 0 then
        redis.call('HDEL', 'rerankq:alone', owner)
      end
    end
  end
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', 'rerankq:deadlines', '-inf', stamp(time), 'LIMIT', 0, limit)) do
  if settle(id, ttl, channel) == 'expired' then expired = expired + 1
  else redis.call('ZREM', 'rerankq:deadlines', id) end
end

local free_since = {}
for at = 8, #ARGV, 2 do free_since[ARGV[at]] = tonumber(ARGV[at + 1]) end
for _, queue in ipairs(redis.call('SMEMBERS', 'rerankq:queues')) do
  local answered = (tonumber(redis.call('HGET', 'rerankq:answered', queue) or '') or 0) - 10
  local cutoff = answered
  local free = free_since[queue]
  -- A slot was free all this time, so every bell in the broker has been heard.
  if free and time - free >= grace then cutoff = math.max(cutoff, time - grace) end
  for _, tenant in ipairs(redis.call('SMEMBERS', tenants_key(queue))) do
    local rung = rung_key(queue, tenant)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', rung, '-inf', stamp(cutoff), 'LIMIT', 0, limit)) do
      redis.call('ZREM', rung, id)
      -- Not where the job was removed or damaged by other hands than ours: there is nothing to ring for.
      if written(job_key(id)) == 'queued' then
        -- It has waited for its turn once: its next bell overtakes the others.
        redis.call('HSET', job_key(id), 'lost', 1)
        redis.call('ZADD', waiting_key(queue, tenant), place(job_key(id)), id)
        bells = bells + 1
      end
    end
  end
end
return {lapsed, dead, expired, bells}
