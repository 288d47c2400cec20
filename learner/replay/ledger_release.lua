-- Put the episode back if it is still the owner's; returns 1 or 0.
-- ARGV: episode, owner
if redis.call('HGET', OWNERS, ARGV[1]) ~= ARGV[2] then
  return 0
end
forget_lease(ARGV[1])
if tonumber(ARGV[1]) < tonumber(redis.call('HGET', META, 'episodes')) then
  redis.call('ZADD', PENDING, ARGV[1], ARGV[1])
else
  redis.call('HDEL', SNAPSHOTS, ARGV[1])
end
return 1
