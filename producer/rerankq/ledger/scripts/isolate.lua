-- id fence owner | From now on a death of this worker is this job's doing. Answers 1, or 0 if the job is no longer held.
begin_freeing()
local key = job_key(ARGV[1])
if not holds(key, ARGV[2]) then return 0 end
redis.call('HSET', 'rerankq:alone', ARGV[3], ARGV[1])
note(key, 'alone', ARGV[3])
return 1
