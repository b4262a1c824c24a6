-- id content queue tenant priority pairs deadline_s label model payload | max_pairs max_memory window ttl channel | weights
-- Answers {state, send}; {'conflict', 0}: the id stands for other content; {'full', pairs waiting}: the backlog is at
-- its limit; {'memory_full', percent}: the server's memory is.
-- weights: fingerprints of the living workers of its model, by commas. If its stored ranking was made by others, the job is queued again.
local id, content, queue, tenant, priority, pairs_in, deadline_s, label, model, payload,
  max_pairs, max_memory, window, ttl, channel, weights = unpack(ARGV)
pairs_in, max_pairs, max_memory, window = tonumber(pairs_in), tonumber(max_pairs), tonumber(max_memory), tonumber(window)
local key = job_key(id)

local held = redis.call('HGET', key, 'content')
if held then
  if held ~= content then return {'conflict', 0} end
  local state = current_state(id, ttl, channel)
  if state == 'queued' or state == 'running' then
    -- A full server may refuse to write it: that is no fault of the job.
    if tonumber(ttl) > asked_ttl(key) then redis.pcall('HSET', key, 'ttl', longer(0, ttl)) end
  end
  if state == 'queued' then
    local job = fields(key, 'queue', 'priority', 'deadline')
    -- The latest deadline of all who submitted it counts: an earlier, shorter one must not expire this one.
    local deadline = job.deadline
    if deadline ~= '' then
      deadline = deadline_s == '' and '' or stamp(math.max(tonumber(deadline), now() + tonumber(deadline_s)))
      redis.call('HSET', key, 'deadline', deadline)
      if deadline == '' then redis.call('ZREM', KEY.deadlines, id)
      else redis.call('ZADD', KEY.deadlines, deadline, id) end
    end
    -- An interactive submission lifts a bulk job; and the newest submission knows where its model is served now.
    if priority == 'interactive' and job.priority == 'bulk' or priority == job.priority and queue ~= job.queue then
      dequeue(id, job.queue, tenant, pairs_in)
      redis.call('HSET', key, 'queue', queue, 'priority', priority, 'label', label, 'model', model)
      enqueue(id, queue, tenant, pairs_in, deadline)
      return {state, may_send(id, queue, tenant, window)}
    end
    return {state, 0}
  end
  local by = state == 'done' and redis.call('HGET', key, 'weights')
  -- Any of them will do: while a fleet is renewed, jobs do not go back and forth.
  local outdated = by and weights ~= '' and not string.find(',' .. weights .. ',', ',' .. by .. ',', 1, true)
  -- Never for less time than was asked before.
  if state == 'done' and not outdated then redis.call('EXPIRE', key, longer(redis.call('TTL', key), ttl)) end
  if state == 'running' or state == 'done' and not outdated or state == 'dead' then return {state, 0} end
end

local waiting = tonumber(redis.call('HGET', KEY.backlog, '*') or '0')
-- A job larger than the whole limit is still taken into an empty queue: MAX_CHUNKS bounds it already.
if waiting > 0 and waiting + pairs_in > max_pairs then return {'full', waiting} end
-- Refused well before the server would: what is accepted must be able to leave again.
local memory = memory_with(#payload)
if memory > max_memory then return {'memory_full', memory} end

local created = stamp(now())
local deadline = deadline_s == '' and '' or stamp(now() + tonumber(deadline_s))
-- Only if there is something: a writing command here would make a full server accept what follows.
if held or redis.call('EXISTS', key) == 1 then redis.call('DEL', key) end
redis.call('HSET', key, 'state', 'queued', 'content', content, 'queue', queue, 'tenant', tenant, 'priority', priority,
  'pairs', pairs_in, 'deadline', deadline, 'label', label, 'model', model, 'payload', payload, 'created', created,
  'fence', 0, 'claims', 0, 'deaths', 0, 'suspect', 0, 'done_pairs', 0)
if tonumber(ttl) ~= USUAL_TTL then redis.call('HSET', key, 'ttl', longer(0, ttl)) end
enqueue(id, queue, tenant, pairs_in, deadline, order_of_newest(queue, tenant))
return {'queued', may_send(id, queue, tenant, window)}
