-- lease_s then id fence done_pairs, repeated | Answers the ids that this worker no longer holds.
begin_freeing()
local lease_end = stamp(now() + tonumber(ARGV[1]))
local lost = {}
for at = 2, #ARGV, 3 do
  local id = ARGV[at]
  local key = job_key(id)
  if holds(key, ARGV[at + 1]) then
    redis.call('ZADD', 'rerankq:running', lease_end, id)
    redis.call('HSET', key, 'done_pairs', ARGV[at + 2])
  else
    lost[#lost + 1] = id
  end
end
return lost
