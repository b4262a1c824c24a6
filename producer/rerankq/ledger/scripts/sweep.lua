-- sweeper watched_s lease_s max_attempts ttl channel limit grace_s counted_at then queue messages, repeated
-- Judge lapsed leases, expire, and take back lost doorbells so that they are sent again.
-- watched_s: for how long this sweeper has seen the ledger without a break; a lease that lapsed has until it was whole.
-- lease_s: of claims that store none. counted_at: when the broker was asked how many messages it holds of each queue.
-- Answers {lapsed, dead, expired, doorbells taken back, queue...}, the queues with doorbells out for longer than grace_s; or {}
-- where another sweeper holds the lock.
begin_freeing()
local sweeper, watched, lease_s, max_attempts, ttl, channel, limit, grace, counted_at = unpack(ARGV, 1, 9)
watched, lease_s, max_attempts = tonumber(watched), tonumber(lease_s), tonumber(max_attempts)
limit, grace, counted_at = tonumber(limit), tonumber(grace), tonumber(counted_at)
local lock = redis.call('GET', KEY.sweeper)
if lock and lock ~= sweeper then
  -- It lasts longer only where the clock was set back.
  if redis.call('PTTL', KEY.sweeper) > POLICY.sweeper_lock_ms then
    redis.call('PEXPIRE', KEY.sweeper, POLICY.sweeper_lock_ms)
  end
  return {}
end
redis.call('SET', KEY.sweeper, sweeper, 'PX', POLICY.sweeper_lock_ms)
local time = now()
local lapsed, dead, expired, doorbells = 0, 0, 0, 0

local last = tonumber(redis.call('GET', KEY.clock) or '')
redis.call('SET', KEY.clock, stamp(time))
if last and time < last then
  -- The clock was set back: no lease ends later than its own length from now.
  local held = redis.call('ZRANGE', KEY.running, 0, -1, 'WITHSCORES')
  for at = 1, #held, 2 do
    local latest = time + lease_of(job_key(held[at]), lease_s)
    if tonumber(held[at + 1]) > latest then redis.call('ZADD', KEY.running, stamp(latest), held[at]) end
  end
end

local function judge_lapsed(id)
  local key = job_key(id)
  local job = fields(key, 'owner', 'suspect', 'deaths', 'fence')
  local owner, lease = job.owner or '', lease_of(key, lease_s)
  local alone = redis.call('HGET', KEY.alone, owner)
  local wait = watched < lease and lease - watched
  -- The death that sets it aside: as long as its worker may only be paused, the claim stands.
  if alone == id and job.deaths + 1 >= max_attempts and not gone(owner, lease) then wait = wait or 1 end
  if wait then return redis.call('ZADD', KEY.running, stamp(time + wait), id) end

  note(key, 'lease-over', owner)
  lapsed = lapsed + 1
  if requeue_lost(id, key, job, alone, max_attempts, channel, true) then dead = dead + 1 end
end

local over = redis.call('ZRANGEBYSCORE', KEY.running, '-inf', stamp(time), 'LIMIT', 0, limit)
for _, id in ipairs(over) do
  if current_state(id, ttl, channel) == 'running' then judge_lapsed(id) else redis.call('ZREM', KEY.running, id) end
end
if #over < limit then
  -- All leases that were over are judged: which jobs gone workers had alone is of no more use.
  local alone = redis.call('HGETALL', KEY.alone)
  for at = 1, #alone, 2 do
    local owner = alone[at]
    local still_held = redis.pcall('HGET', job_key(alone[at + 1]), 'owner') == owner
    if not still_held and redis.call('HEXISTS', KEY.workers, owner) == 0 then
      redis.call('HDEL', KEY.alone, owner)
    end
  end
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEY.deadlines, '-inf', stamp(time), 'LIMIT', 0, limit)) do
  if current_state(id, ttl, channel) == 'expired' then expired = expired + 1
  else redis.call('ZREM', KEY.deadlines, id) end
end

-- Lost doorbells: more of a queue are out than its broker holds messages. Those out for longest are taken back, as many as
-- are missing. So the broker never holds more messages for being sent again than doorbells are out.
local held_by_broker = {}
for at = 10, #ARGV, 2 do held_by_broker[ARGV[at]] = tonumber(ARGV[at + 1]) end
-- A doorbell that was sent later than now was sent before the clock was set back.
local future = '(' .. stamp(time)
local overdue = {}

local function out_for_longest(queue, tenants, most)
  local found = {}
  for _, tenant in ipairs(tenants) do
    local sent = sent_key(queue, tenant)
    for _, range in ipairs({{from = future, to = '+inf'}, {from = '-inf', to = stamp(counted_at - grace)}}) do
      local doorbells_out = redis.call('ZRANGEBYSCORE', sent, range.from, range.to, 'WITHSCORES', 'LIMIT', 0, most)
      for at = 1, #doorbells_out, 2 do
        local sent_at = tonumber(doorbells_out[at + 1])
        found[#found + 1] = {
          id = doorbells_out[at], sent_at = sent_at > time and 0 or sent_at,
          sent = sent, waiting = waiting_key(queue, tenant),
        }
      end
    end
  end
  table.sort(found, function(one, other) return one.sent_at < other.sent_at end)
  return found
end

for _, queue in ipairs(redis.call('SMEMBERS', KEY.queues)) do
  local tenants = redis.call('SMEMBERS', tenants_key(queue))
  local messages = counted_at <= time and held_by_broker[queue]
  local missing, old = messages and -messages or 0, 0
  for _, tenant in ipairs(tenants) do
    local sent = sent_key(queue, tenant)
    local before = redis.call('ZCOUNT', sent, future, '+inf')
    old = old + before + redis.call('ZCOUNT', sent, '-inf', stamp(time - grace))
    if messages then missing = missing + before + redis.call('ZCOUNT', sent, '-inf', stamp(counted_at)) end
  end
  if old > 0 then overdue[#overdue + 1] = queue end
  if messages and missing > 0 and old > 0 then
    local found = out_for_longest(queue, tenants, math.min(missing, limit))
    for at = 1, math.min(missing, limit, #found) do
      local id = found[at].id
      redis.call('ZREM', found[at].sent, id)
      -- Not if the job was removed or damaged: there is nothing to send for.
      if stored_state(job_key(id)) == 'queued' then
        -- It has waited for its turn once, so its next doorbell overtakes the others.
        redis.call('HSET', job_key(id), 'lost', 1)
        redis.call('ZADD', found[at].waiting, order_of(job_key(id)), id)
        doorbells = doorbells + 1
      end
    end
  end
end
return {lapsed, dead, expired, doorbells, unpack(overdue)}
