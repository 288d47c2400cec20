-- Make the ids 0..n-1 known; returns the fingerprint the ledger was opened with first.
-- ARGV: fingerprint, n
local fingerprint = redis.call('HGET', META, 'fingerprint')
if fingerprint and fingerprint ~= ARGV[1] then
  return fingerprint
end
local known, wanted = tonumber(redis.call('HGET', META, 'episodes') or '0'), tonumber(ARGV[2])
-- Fewer than before: what nobody plays yet is withdrawn; what is being played may still be completed.
redis.call('ZREMRANGEBYSCORE', PENDING, wanted, '+inf')
for _, id in ipairs(redis.call('HKEYS', SNAPSHOTS)) do
  if not (tonumber(id) and tonumber(id) < wanted) and not redis.call('ZSCORE', LEASES, id) then
    redis.call('HDEL', SNAPSHOTS, id)
  end
end
for id = known, wanted - 1 do
  if redis.call('HEXISTS', DONE, id) == 0 and not redis.call('ZSCORE', LEASES, id) then
    redis.call('ZADD', PENDING, id, id)
  end
end
redis.call('HSET', META, 'fingerprint', ARGV[1], 'episodes', wanted)
return ARGV[1]
