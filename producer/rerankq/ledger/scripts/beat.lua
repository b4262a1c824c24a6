-- worker info gone_after_s | Register a sign of life; forget workers that have given none for long. Answers the time.
begin_freeing()
local time = now()
redis.call('HSET', 'rerankq:workers', ARGV[1], stamp(time) .. ' ' .. ARGV[2])
local workers = redis.call('HGETALL', 'rerankq:workers')
for at = 1, #workers, 2 do
  local beaten = tonumber(string.match(workers[at + 1], '^(%S+)') or '')
  if not beaten or beaten < time - tonumber(ARGV[3]) then
    redis.call('HDEL', 'rerankq:workers', workers[at])
  end
end
return stamp(time)
