-- Add sequences whose ids are new, then evict the oldest beyond the capacity; returns how many ids are held.
-- ARGV: capacity in sequences, capacity in bytes (0: unlimited), then id, weight, Exp(1), payload of each
local now, total, bytes = state('now'), state('total'), state('bytes')
local generation, inserted, evicted = state('generation'), state('inserted'), state('evicted')
local capacity_sequences, capacity_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local size = redis.call('ZCARD', AGE)

for i = 3, #ARGV, 4 do
  local id, weight = ARGV[i], tonumber(ARGV[i + 1])
  if redis.call('HEXISTS', IDS, id) == 0 then
    generation = generation + 1
    local key = string.format('%d:', generation) .. id
    redis.call('HSET', DATA, key, ARGV[i + 3])
    redis.call('HSET', WEIGHT, key, ARGV[i + 1])
    redis.call('ZADD', CLOCK, exact(now + tonumber(ARGV[i + 2]) / weight), key)
    redis.call('ZADD', AGE, generation, key)
    redis.call('HSET', IDS, id, generation)
    total, bytes, inserted, size = total + weight, bytes + #ARGV[i + 3], inserted + 1, size + 1
  end
end

while size > capacity_sequences or (capacity_bytes > 0 and bytes > capacity_bytes) do
  local weight, length = remove(redis.call('ZRANGE', AGE, 0, 0)[1])
  total, bytes, evicted, size = total - weight, bytes - length, evicted + 1, size - 1
end

set_total(total)
redis.call('HSET', STATE, 'bytes', bytes, 'generation', generation, 'inserted', inserted, 'evicted', evicted)

local held = 0
for i = 3, #ARGV, 4 do
  held = held + redis.call('HEXISTS', IDS, ARGV[i])
end
return held
