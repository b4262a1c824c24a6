-- id ttl channel window
-- Queue a dead job again, its deaths forgiven, its history kept. Answers {state, send, queue, label}; a job that is not
-- dead, or whose record is damaged, stays as it is.
begin_freeing()
local id, ttl, channel, window = unpack(ARGV)
local key = job_key(id)
local state = current_state(id, ttl, channel)
if state ~= 'dead' or not intact(key) then return {state, 0, '', ''} end
redis.call('ZREM', KEY.dead, id)
redis.call('HDEL', key, 'started', 'ended', 'error_type', 'error', 'lost', 'spared')
redis.call('HSET', key, 'claims', 0, 'deaths', 0, 'done_pairs', 0, 'forgiven', redis.call('HGET', key, 'fence'))
note(key, 'retried', '')
-- Still a suspect: if it kills again, it does so alone.
queue_again(key, id, 1)
local job = fields(key, 'queue', 'tenant', 'label')
return {'queued', may_send(id, job.queue, job.tenant, tonumber(window)), job.queue, job.label or ''}
