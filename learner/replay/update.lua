-- Give sequences new weights; a key that is gone (evicted, or its id in use again) is passed over.
-- Returns how many were changed.     ARGV: key, weight, Exp(1) of each
run_also_when_full()
local now, total, changed = state('now'), state('total'), 0
for i = 1, #ARGV, 3 do
  local key, weight = ARGV[i], tonumber(ARGV[i + 1])
  local before = redis.call('HGET', WEIGHT, key)
  if before then
    total = total + weight - tonumber(before)
    redis.call('HSET', WEIGHT, key, ARGV[i + 1])
    -- The exponential has no memory: what was left of the old clock may be thrown away.
    redis.call('ZADD', CLOCK, exact(now + tonumber(ARGV[i + 2]) / weight), key)
    changed = changed + 1
  end
end
set_total(total)
return changed
