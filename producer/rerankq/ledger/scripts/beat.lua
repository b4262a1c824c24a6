-- worker info gone_after_s | Register a sign of life; forget workers that have given none for long. Answers the time.
begin_freeing()
local function asked(info) return tonumber(string.match(info, '"gone_after_s": ([%d.]+)') or '') or 0 end
local time = now()
take_back(ARGV[1])
redis.call('HSET', 'rerankq:workers', ARGV[1], stamp(time) .. ' ' .. ARGV[2])
local workers = redis.call('HGETALL', 'rerankq:workers')
for at = 1, #workers, 2 do
  local beaten, info = string.match(workers[at + 1], '^(%S+)(.*)$')
  beaten = tonumber(beaten or '')
  -- Each for as long as it asked itself: a worker of longer leases may be silent for longer.
  if not beaten or beaten < time - math.max(tonumber(ARGV[3]), asked(info)) then
    redis.call('HDEL', 'rerankq:workers', workers[at])
  elseif beaten > time then
    -- The clock was set back since: nobody lives longer for that.
    redis.call('HSET', 'rerankq:workers', workers[at], stamp(time) .. info)
  end
end
return stamp(time)
