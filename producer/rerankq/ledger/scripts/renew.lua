-- lease_s then id fence done_pairs, repeated | Answers the ids that this worker no longer holds.
begin_freeing()
local lease_end = stamp(now() + tonumber(ARGV[1]))
local lost = {}
for at = 2, #ARGV, 3 do
  local id, fence, done_pairs = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local key = job_key(id)
  if holds(key, fence) then
    redis.call('ZADD', KEY.running, lease_end, id)
    redis.call('HSET', key, 'done_pairs', done_pairs)
  else
    lost[#lost + 1] = id
  end
end
return lost
