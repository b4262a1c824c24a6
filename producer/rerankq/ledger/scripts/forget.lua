-- id ttl channel | Drop what is stored of an ended job; a dead one stays for whoever looks into it. Answers its state.
local state = settle(ARGV[1], ARGV[2], ARGV[3])
if state == 'done' or state == 'failed' or state == 'expired' or state == 'cancelled' then
  redis.call('UNLINK', job_key(ARGV[1]))
end
return state
