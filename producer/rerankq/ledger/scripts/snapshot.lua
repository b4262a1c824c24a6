-- id ttl channel with_ranking
-- Answers {state, done_pairs, pairs, created, started, ended, claims, error_type, error, ranking}; '' where there is none.
local id = ARGV[1]
local state = settle(id, ARGV[2], ARGV[3])
local key = job_key(id)
keep_findable(id, key, state)
local fields = redis.call('HMGET', key, 'done_pairs', 'pairs', 'created', 'started', 'ended', 'claims', 'error_type', 'error')
local ranking = ''
if ARGV[4] == '1' and state == 'done' then ranking = redis.call('HGET', key, 'ranking') or '' end
local answer = {state}
for at = 1, 8 do answer[at + 1] = fields[at] or '' end
answer[10] = ranking
return answer
