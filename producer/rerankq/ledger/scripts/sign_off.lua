-- worker... | These have ended: no machine runs such a process any more. Answers how many the registry held.
begin_freeing()
return redis.call('HDEL', KEY.workers, unpack(ARGV))
