-- Lease the lowest episode that is pending or whose lease has run out; returns its id or nil.
-- ARGV: owner, lease in ms, token of this call
local last = redis.call('HGET', CLAIMS, ARGV[1])
if last then
  local token, id = string.match(last, '^(%S+) (%d+)$')
  -- The same call again: its reply was lost on the way.
  if token == ARGV[3] and redis.call('HGET', OWNERS, id) == ARGV[1] then
    return tonumber(id)
  end
end

local now = now_ms()
local lowest = tonumber(redis.call('ZRANGE', PENDING, 0, 0)[1])
for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now)) do
  lowest = math.min(lowest or math.huge, tonumber(id))
end
if not lowest then
  return nil
end
redis.call('ZREM', PENDING, lowest)
redis.call('ZADD', LEASES, now + ARGV[2], lowest)
redis.call('HSET', OWNERS, lowest, ARGV[1])
redis.call('HSET', CLAIMS, ARGV[1], ARGV[3] .. ' ' .. lowest)
return lowest
