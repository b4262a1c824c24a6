-- id with_payload
-- Answers {state, queue, tenant, label, pairs, deaths, created, ended, error, history, payload}; '' where there is none.
local key = job_key(ARGV[1])
if written(key) == 'damaged' then return {'damaged'} end
local names = {'state', 'queue', 'tenant', 'label', 'pairs', 'deaths', 'created', 'ended', 'error', 'history'}
if ARGV[2] == '1' then names[#names + 1] = 'payload' end
local answer = redis.call('HMGET', key, unpack(names))
for at = 1, 11 do answer[at] = answer[at] or '' end
return answer
