-- What the replay's scripts share; joined in front of each of them. The idea stands in replay.py.
-- KEYS 1 to 6 are, everywhere:
local CLOCK, DATA, WEIGHT, AGE, IDS, STATE = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

-- Lua would print 14 digits; 17 bring a double back exactly.
local function exact(number)
  return string.format('%.17g', number)
end

local function state(field)
  return tonumber(redis.call('HGET', STATE, field) or '0')
end

-- Where the server is full, only a script whose first write is a deletion may run to its end.
local function run_also_when_full()
  redis.call('HDEL', STATE, 'none')
end

-- The total weight, and its peak since the last exact sum (see `refresh_if_stale`).
local function set_total(total)
  redis.call('HSET', STATE, 'total', exact(total), 'peak', exact(math.max(total, state('peak'))))
end

-- Remove one sequence with all that belongs to it; returns its weight and bytes, or nil if there is none.
local function remove(key)
  local weight = redis.call('HGET', WEIGHT, key)
  if not weight then
    return nil
  end
  local bytes = redis.call('HSTRLEN', DATA, key)
  local id = string.sub(key, string.find(key, ':', 1, true) + 1)
  redis.call('HDEL', DATA, key)
  redis.call('HDEL', WEIGHT, key)
  redis.call('ZREM', CLOCK, key)
  redis.call('ZREM', AGE, key)
  redis.call('HDEL', IDS, id)
  return tonumber(weight), bytes
end

-- Sum the weights anew, and turn the clocks back so that now is 0. In the order of age: the same sum each time.
local function refresh()
  local total = 0
  for _, key in ipairs(redis.call('ZRANGE', AGE, 0, -1)) do
    total = total + tonumber(redis.call('HGET', WEIGHT, key))
  end
  local now = state('now')
  local clocks = redis.call('ZRANGE', CLOCK, 0, -1, 'WITHSCORES')
  for i = 1, #clocks, 2 do
    redis.call('ZADD', CLOCK, exact(math.max(0, tonumber(clocks[i + 1]) - now)), clocks[i])
  end
  redis.call('HSET', STATE, 'total', exact(total), 'peak', exact(total), 'now', '0', 'draws', '0')
  return total
end

-- Rounding: `total` drifts by 1e-16 of its peak with each change, and the clocks, whose steps are 1/total, lose
-- digits as `now` grows. At these bounds both are still right to about 1e-6.
local function refresh_if_stale()
  local total = state('total')
  if state('now') * total > 1e9 or total < 1e-6 * state('peak') or state('draws') > 1e6 then
    return refresh()
  end
  return total
end
