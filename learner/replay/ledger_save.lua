-- Keep a snapshot of the episode if it is still the owner's; returns 1, or 0 where it is not or the server is full.
-- ARGV: episode, owner, snapshot
if redis.call('HGET', OWNERS, ARGV[1]) ~= ARGV[2] then
  return 0
end
-- pcall: on a full server the episode goes on without, and the snapshot before it stays.
local answer = redis.pcall('HSET', SNAPSHOTS, ARGV[1], ARGV[3])
return type(answer) == 'number' and 1 or 0
