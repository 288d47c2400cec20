-- Add sequences whose ids are new, then evict the oldest beyond the capacity. The result is how many ids are held.
-- ARGV from 3: capacity in sequences, capacity in bytes (0: unlimited), then id, weight, Exp(1), payload of each
local before = remembered()
if before then
  return answer(before)
end
if not untouched then
  sweep()
end
local capacity_sequences, capacity_bytes = tonumber(ARGV[3]), tonumber(ARGV[4])

local ids = {}
for i = 5, #ARGV, 4 do
  ids[#ids + 1] = ARGV[i]
end

-- The places of ids that are not held, each id once.
local new, seen = {}, {}
for n, generation in ipairs(redis.call('HMGET', IDS, unpack(ids))) do
  if not generation and not seen[ids[n]] then
    seen[ids[n]], new[#new + 1] = true, 1 + 4 * n
    add_to_total(tonumber(ARGV[2 + 4 * n]))
  end
end
turn_back_if_worn()

local data, records, clocks, ages, generations = {}, {}, {}, {}, {}
for n, i in ipairs(new) do
  local id, weight, payload = ARGV[i], ARGV[i + 1], ARGV[i + 3]
  local generation = string.format('%d', state.generation + n)
  local key = generation .. ':' .. id
  local first, second = 2 * n - 1, 2 * n
  data[first], data[second] = key, payload
  records[first], records[second] = key, weight .. ' ' .. #payload
  clocks[first], clocks[second] = state.now + tonumber(ARGV[i + 2]) / tonumber(weight), key
  ages[first], ages[second] = generation, key
  generations[first], generations[second] = id, generation
  state.bytes = state.bytes + #payload
end
write('HSET', DATA, data) -- the first write: a full server refuses it, and with it all that follows
write('HSET', WEIGHT, records)
write('ZADD', CLOCK, clocks)
write('ZADD', AGE, ages)
write('HSET', IDS, generations)
state.generation, state.inserted, size = state.generation + #new, state.inserted + #new, size + #new

local function is_over(count, bytes)
  return count > capacity_sequences or (capacity_bytes > 0 and bytes > capacity_bytes)
end

while size > 0 and is_over(size, state.bytes) do
  local most = math.min(math.max(size - capacity_sequences, #new, 1), AT_ONCE)
  local oldest = redis.call('ZRANGE', AGE, 0, most - 1)
  local weights, bytes = records_of(oldest)
  if weights then
    local count, left = 0, state.bytes
    while count < #oldest and is_over(size - count, left) do
      count = count + 1
      left = left - bytes[count]
    end
    remove({unpack(oldest, 1, count)}, weights, bytes)
    state.evicted = state.evicted + count
  end
end
write_state()

local held = #ids
if #new < #ids or #ids > capacity_sequences or capacity_bytes > 0 then -- else none of them was evicted again
  held = 0
  for _, generation in ipairs(redis.call('HMGET', IDS, unpack(ids))) do
    held = held + (generation and 1 or 0)
  end
end
return answer(remember(held))
