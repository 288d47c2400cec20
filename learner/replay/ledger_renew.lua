-- Extend the lease if the episode is still the owner's; returns 1 or 0.
-- ARGV: episode, owner, lease in ms
if redis.call('HGET', OWNERS, ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('ZADD', LEASES, now_ms() + ARGV[3], ARGV[1])
return 1
