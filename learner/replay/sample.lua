-- Draw k sequences with replacement: the next k rings of the race. Returns {keys, probabilities, payloads}, or
-- {inserted, sampled} when the learner must wait.
-- KEYS[7]: the caller's last result
-- ARGV: request, k, min_sequences, replay_ratio, tolerance, seconds to keep the result, then k times Exp(1)
local LAST = KEYS[7]
run_also_when_full()
local k = tonumber(ARGV[2])

local function answer(keys, probabilities)
  return {keys, probabilities, redis.call('HMGET', DATA, unpack(keys))}
end

-- A request that comes again lost its reply on the way: the same draw is its answer.
if redis.call('LINDEX', LAST, 0) == ARGV[1] then
  local keys, probabilities = {}, {}
  for i, value in ipairs(redis.call('LRANGE', LAST, 1, -1)) do
    local list = (i <= k) and keys or probabilities
    list[#list + 1] = value
  end
  return answer(keys, probabilities)
end

local inserted, sampled = state('inserted'), state('sampled')
redis.call('HSET', STATE, 'batch', k)
if inserted < tonumber(ARGV[3]) or redis.call('ZCARD', AGE) == 0
    or sampled + k > inserted * tonumber(ARGV[4]) + tonumber(ARGV[5]) then
  redis.call('HINCRBY', STATE, 'waits', 1)
  return {inserted, sampled}
end

local total, now = refresh_if_stale(), state('now')
local keys, probabilities = {}, {}
for i = 1, k do
  local first = redis.call('ZRANGE', CLOCK, 0, 0, 'WITHSCORES')
  local key, weight = first[1], tonumber(redis.call('HGET', WEIGHT, first[1]))
  now = tonumber(first[2])
  redis.call('ZADD', CLOCK, exact(now + tonumber(ARGV[6 + i]) / weight), key)
  keys[i], probabilities[i] = key, exact(math.min(1, weight / total))
end

redis.call('HSET', STATE, 'now', exact(now), 'sampled', sampled + k, 'draws', state('draws') + k)
redis.call('DEL', LAST)
redis.call('RPUSH', LAST, ARGV[1], unpack(keys))
redis.call('RPUSH', LAST, unpack(probabilities))
redis.call('EXPIRE', LAST, ARGV[6])
return answer(keys, probabilities)
