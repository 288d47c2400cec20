-- Remove sequences that do not decode; the draw that found one does not count as sampled.
-- Returns how many were removed.     ARGV: keys
run_also_when_full()
local total, bytes, removed = state('total'), state('bytes'), 0
for _, key in ipairs(ARGV) do
  local weight, length = remove(key)
  if weight then
    total, bytes, removed = total - weight, bytes - length, removed + 1
  end
end
set_total(total)
redis.call('HSET', STATE, 'bytes', bytes)
redis.call('HINCRBY', STATE, 'rejected', removed)
redis.call('HINCRBY', STATE, 'sampled', -removed)
return removed
