-- lease_s look_s limit ttl channel | Take deliveries that are due, of jobs that have ended, for lease_s seconds.
-- Answers {id, name, token, record} of each, flat; the token proves to webhook_report who holds it. Jobs that have not ended
-- are looked at again after look_s.
local lease_s, look_s, limit, ttl, channel = unpack(ARGV)
local time, taken = now(), {}
limit = tonumber(limit)
local due = redis.call('ZRANGEBYSCORE', KEY.webhooks, '-inf', stamp(time), 'LIMIT', 0, limit)
if #due > 0 then begin_freeing() end
for _, id in ipairs(due) do
  local state = current_state(id, ttl, channel)
  if state == 'queued' or state == 'running' then
    redis.call('ZADD', KEY.webhooks, stamp(time + tonumber(look_s)), id)
  else
    local key = webhook_key(id)
    local found = redis.call('HGETALL', key)
    for at = 1, #found, 2 do
      local name = string.match(found[at], '^(.*)|next$')
      -- Not until it is time again; those beyond the limit stay due.
      if name and #taken < 4 * limit and (tonumber(found[at + 1]) or 0) <= time then
        local record = redis.call('HGET', key, name)
        local token = stamp(time + tonumber(lease_s))
        if record then
          redis.call('HSET', key, found[at], token)
          for _, part in ipairs({id, name, token, record}) do taken[#taken + 1] = part end
        else
          redis.call('HDEL', key, found[at])
        end
      end
    end
    plan_webhooks(id)
  end
end
return taken
