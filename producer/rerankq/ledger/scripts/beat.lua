-- worker info forget_after_s | Register a sign of life; forget workers that have given none for long. Answers the time.
begin_freeing()
local worker, info, forget_after = ARGV[1], ARGV[2], tonumber(ARGV[3])
local function asked(by) return tonumber(string.match(by, '"forget_after_s": ([%d.]+)') or '') or 0 end
local time = now()
clear_accused(worker)
redis.call('HSET', KEY.workers, worker, stamp(time) .. ' ' .. info)
local workers = redis.call('HGETALL', KEY.workers)
for at = 1, #workers, 2 do
  local name = workers[at]
  local beat_at, rest = string.match(workers[at + 1], '^(%S+)(.*)$')
  beat_at = tonumber(beat_at or '')
  -- Each for as long as it asked itself: a worker of longer leases may be silent for longer.
  if not beat_at or beat_at < time - math.max(forget_after, asked(rest)) then
    redis.call('HDEL', KEY.workers, name)
  elseif beat_at > time then
    -- The clock was set back since: nobody lives longer for that.
    redis.call('HSET', KEY.workers, name, stamp(time) .. rest)
  end
end
return stamp(time)
