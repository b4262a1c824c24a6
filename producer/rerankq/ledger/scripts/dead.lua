-- first last | Answers the ids of dead jobs by their places in line, the longest dead first.
return redis.call('ZRANGE', 'rerankq:dead', ARGV[1], ARGV[2])
