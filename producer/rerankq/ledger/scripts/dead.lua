-- first last | Answers the ids of dead jobs from one position to another, the longest dead first.
return redis.call('ZRANGE', KEY.dead, ARGV[1], ARGV[2])
