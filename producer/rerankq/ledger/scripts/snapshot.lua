-- id ttl channel with_ranking
-- Answers {state, done_pairs, pairs, created, started, ended, claims, error_type, error, tenant, ranking}; '' where there is none.
local id, ttl, channel, with_ranking = unpack(ARGV)
local state = current_state(id, ttl, channel)
local key = job_key(id)
restore_to_index(id, key, state)
local names = {'done_pairs', 'pairs', 'created', 'started', 'ended', 'claims', 'error_type', 'error', 'tenant'}
local job = fields(key, unpack(names))
local answer = {state}
for _, name in ipairs(names) do answer[#answer + 1] = job[name] or '' end
answer[#answer + 1] = with_ranking == '1' and state == 'done' and redis.call('HGET', key, 'ranking') or ''
return answer
