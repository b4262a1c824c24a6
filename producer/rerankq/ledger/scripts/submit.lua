-- id content queue tenant priority pairs deadline_s label model payload | max_pairs max_memory window ttl channel | weights
-- Answers {state, send}; {'conflict', 0}: the id stands for other content; {'full', pairs waiting}: the backlog is at
-- its limit; {'memory_full', percent}: the server's memory is.
-- weights: fingerprints of the living workers of its model, by commas. A ranking of others is not today's: the job is queued again.
local id, content, queue, tenant, priority = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local pairs_in, deadline_s, label, model, payload = tonumber(ARGV[6]), ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local max_pairs, max_memory, window = tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
local ttl, channel, weights = ARGV[14], ARGV[15], ARGV[16]
local key = job_key(id)

local held = redis.call('HGET', key, 'content')
if held then
  if held ~= content then return {'conflict', 0} end
  local state = settle(id, ttl, channel)
  if state == 'queued' or state == 'running' then
    -- A full server may refuse to note it: that is no fault of the job.
    if tonumber(ttl) > asked_ttl(key) then redis.pcall('HSET', key, 'ttl', longer(0, ttl)) end
  end
  if state == 'queued' then
    local job = redis.call('HMGET', key, 'queue', 'priority', 'deadline')
    -- Whoever asks with more patience gives it to all: an earlier, shorter deadline must not expire this one.
    local deadline = job[3]
    if deadline ~= '' then
      deadline = deadline_s == '' and '' or stamp(math.max(tonumber(deadline), now() + tonumber(deadline_s)))
      redis.call('HSET', key, 'deadline', deadline)
      if deadline == '' then redis.call('ZREM', 'rerankq:deadlines', id)
      else redis.call('ZADD', 'rerankq:deadlines', deadline, id) end
    end
    -- An interactive submission lifts a bulk job; and whoever submits knows better where its model is served today.
    if priority == 'interactive' and job[2] == 'bulk' or priority == job[2] and queue ~= job[1] then
      take_out(id, job[1], tenant, pairs_in)
      redis.call('HSET', key, 'queue', queue, 'priority', priority, 'label', label, 'model', model)
      put_in(id, queue, tenant, pairs_in, deadline)
      return {state, may_send(id, queue, tenant, window)}
    end
    return {state, 0}
  end
  local by = state == 'done' and redis.call('HGET', key, 'weights')
  -- Any of them will do: while a fleet is renewed, jobs do not go back and forth.
  local outdated = by and weights ~= '' and not string.find(',' .. weights .. ',', ',' .. by .. ',', 1, true)
  -- Never for less time than somebody asked before.
  if state == 'done' and not outdated then redis.call('EXPIRE', key, longer(redis.call('TTL', key), ttl)) end
  if state == 'running' or state == 'done' and not outdated or state == 'dead' then return {state, 0} end
end

local waiting = tonumber(redis.call('HGET', 'rerankq:backlog', '*') or '0')
-- A job larger than the whole limit still enters an empty queue: MAX_CHUNKS bounds it already.
if waiting > 0 and waiting + pairs_in > max_pairs then return {'full', waiting} end
-- Refused well before the server would: what is accepted must be able to leave again.
local memory = memory_with(#payload)
if memory > max_memory then return {'memory_full', memory} end

local created = stamp(now())
local deadline = deadline_s == '' and '' or stamp(now() + tonumber(deadline_s))
-- Only where there is something: a writing command here would let a full server take what follows.
if held or redis.call('EXISTS', key) == 1 then redis.call('DEL', key) end
redis.call('HSET', key, 'state', 'queued', 'content', content, 'queue', queue, 'tenant', tenant, 'priority', priority,
  'pairs', pairs_in, 'deadline', deadline, 'label', label, 'model', model, 'payload', payload, 'created', created,
  'fence', 0, 'claims', 0, 'deaths', 0, 'suspect', 0, 'done_pairs', 0)
if tonumber(ttl) ~= USUAL_TTL then redis.call('HSET', key, 'ttl', longer(0, ttl)) end
put_in(id, queue, tenant, pairs_in, deadline, last_place(queue, tenant))
return {'queued', may_send(id, queue, tenant, window)}
