-- id | Answers {name, record, next} of each webhook of a job, flat; next: when it is tried again, '' if it is not.
local id = ARGV[1]
local found, listed = redis.call('HGETALL', webhook_key(id)), {}
for at = 1, #found, 2 do
  if not string.find(found[at], '|', 1, true) then
    local next_at = redis.call('HGET', webhook_key(id), found[at] .. '|next') or ''
    for _, part in ipairs({found[at], found[at + 1], next_at}) do listed[#listed + 1] = part end
  end
end
return listed
