-- id name token record wait_s keep_s | Say what became of a delivery that was taken: its record now, and after how many
-- seconds it is tried again; '': it is not, and the job's records are kept for keep_s once none waits.
-- Answers 1; 0 if somebody else took it meanwhile, and nothing is changed.
begin_freeing()
local id, name, token, record, wait_s, keep_s = unpack(ARGV)
local key = webhook_key(id)
if redis.call('HGET', key, name .. '|next') ~= token then return 0 end
if wait_s == '' then
  redis.call('HDEL', key, name .. '|next')
  redis.call('HSET', key, name, record)
else
  redis.call('HSET', key, name, record, name .. '|next', stamp(now() + tonumber(wait_s)))
end
if not plan_webhooks(id) then redis.call('EXPIRE', key, keep_s) end
return 1
