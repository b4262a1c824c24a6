-- id name record look_s ttl channel | Have a URL told when the job has ended; name: which URL, record: as gateways read it.
-- A record of the same name is replaced. Answers the state that the job is in now.
local id, name, record, look_s, ttl, channel = unpack(ARGV)
local key = webhook_key(id)
redis.call('HSET', key, name, record, name .. '|next', stamp(now()))
redis.call('PERSIST', key)
local state = current_state(id, ttl, channel)
local looked_at = now() + ((state == 'queued' or state == 'running') and tonumber(look_s) or 0)
local planned = redis.call('ZSCORE', KEY.webhooks, id)
if not planned or tonumber(planned) > looked_at then redis.call('ZADD', KEY.webhooks, stamp(looked_at), id) end
return state
