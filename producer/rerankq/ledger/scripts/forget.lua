-- id ttl channel dead
-- Drop what is stored of a job that ended and, unless dead = 1, is not dead; or, if dead = 1, of one that is.
-- Answers the state that it was in.
local id, ttl, channel, dead = unpack(ARGV)
dead = dead == '1'
local state = current_state(id, ttl, channel)
if dead then redis.call('ZREM', KEY.dead, id) end
if dead and state == 'dead' or not dead and
  (state == 'done' or state == 'failed' or state == 'expired' or state == 'cancelled') then
  redis.call('UNLINK', job_key(id))
end
return state
