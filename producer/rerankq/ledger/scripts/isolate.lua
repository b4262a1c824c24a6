-- id fence owner | From now on a death of this worker counts against this job. Answers 1, or 0 if it is no longer held.
begin_freeing()
local id, fence, owner = unpack(ARGV)
local key = job_key(id)
if not holds(key, fence) then return 0 end
redis.call('HSET', KEY.alone, owner, id)
note(key, 'alone', owner)
return 1
