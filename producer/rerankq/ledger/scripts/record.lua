-- id with_payload
-- Answers {state, queue, tenant, label, pairs, deaths, created, ended, error, history, payload}; '' where there is none.
local id, with_payload = unpack(ARGV)
local key = job_key(id)
if stored_state(key) == 'damaged' then return {'damaged'} end
local names = {'state', 'queue', 'tenant', 'label', 'pairs', 'deaths', 'created', 'ended', 'error', 'history'}
local job = fields(key, unpack(names))
local answer = {}
for at, name in ipairs(names) do answer[at] = job[name] or '' end
answer[#answer + 1] = with_payload == '1' and redis.call('HGET', key, 'payload') or ''
return answer
