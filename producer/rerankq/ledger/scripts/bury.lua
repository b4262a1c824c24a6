-- worker... | These are gone: their machine holds no such process any more. Answers how many the registry held.
begin_freeing()
return redis.call('HDEL', 'rerankq:workers', unpack(ARGV))
