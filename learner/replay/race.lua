-- What the replay's scripts share; joined in front of each of them. The idea stands in replay.py.
-- KEYS 1 to 7 are, everywhere (the last one is the caller's last result):
local CLOCK, DATA, WEIGHT, AGE, IDS, STATE, LAST = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
-- ARGV 1 and 2 are, everywhere, the request's name and for how many seconds its result is kept.
local REQUEST, KEEP_S = ARGV[1], ARGV[2]

local FIELDS = {
  'now', 'total', 'total_low', 'size', 'bytes', 'generation', 'inserted', 'sampled', 'evicted', 'rejected', 'waits',
  'batch',
}
local AT_ONCE = 4000 -- values in one command: Lua's `unpack` ends at 8000
local MOST = 1e24 -- above every count, sum of weights and time
local NAMED = 20 -- damaged sequences whose names are returned
local state, stored, size = {}, {}, 0 -- the fields as they are now and as they stand in the key; sequences held
local damaged, damaged_count = {}, 0

local function finite(number)
  return number and number - number == 0
end

-- Call `command key values...` for any number of values, in pairs where the command takes pairs. `redis.call` writes
-- numbers with 17 digits, which bring a double back exactly.
local function write(command, key, values)
  for i = 1, #values, AT_ONCE do
    redis.call(command, key, unpack(values, i, math.min(i + AT_ONCE - 1, #values)))
  end
end

-- Read all fields; returns the name of one that is no number, or nil. A number that no replay can have come to is as
-- good as lost: it counts as 0, and what can be summed anew is.
local credible = true
local function read_state()
  local values = redis.call('HMGET', STATE, unpack(FIELDS))
  for i, field in ipairs(FIELDS) do
    state[field] = tonumber(values[i] or '0')
    stored[field] = state[field]
    if not finite(state[field]) then
      return field
    end
    if field ~= 'total_low' and not (state[field] >= 0 and state[field] < MOST) then
      state[field], credible = 0, false
    end
  end
  credible = credible and math.abs(state.total_low) <= 1e-9 * state.total
end

-- Write the fields that have changed.
local function write_state()
  local values = {}
  state.size = size
  if size == 0 then
    state.total, state.total_low, state.bytes = 0, 0, 0
  end
  for _, field in ipairs(FIELDS) do
    if state[field] ~= stored[field] then
      values[#values + 1], values[#values + 2] = field, state[field]
    end
  end
  write('HSET', STATE, values)
end

-- Where the server is full, only a script whose first write is a deletion may run to its end.
local function run_also_when_full()
  redis.call('HDEL', STATE, 'none')
end

-- Keep the result of a request, for the case that its reply is lost.
local function remember(result)
  redis.call('SET', LAST, cmsgpack.pack(REQUEST, result), 'EX', KEEP_S)
  return result
end

-- The result of this very request, where it comes again; nil where it is new, or what lies there is not ours.
local function remembered()
  local kept = redis.call('GET', LAST)
  local sound, request, result = pcall(cmsgpack.unpack, kept or '')
  return sound and request == REQUEST and result or nil
end

-- What every script returns: the number of damaged sequences it removed and some of their names, then its result.
local function answer(result)
  return {{damaged_count, unpack(damaged)}, result}
end

-- a + b as the rounded sum and what rounding took from it (Knuth's TwoSum): together they are exact.
local function two_sum(a, b)
  local sum = a + b
  local part = sum - a
  return sum, (a - (sum - part)) + (b - part)
end

-- The total weight is such a pair, good for 31 digits. So it never has to be summed anew: a billion changes of
-- weights that once were 1e12 times today's leave eleven digits right.
local function add_to_total(weight)
  local sum, lost = two_sum(state.total, weight)
  state.total, state.total_low = two_sum(sum, lost + state.total_low)
end

-- A sequence's record is "w bytes"; nil where it is missing, or not what replay.py writes (which clips w so).
local function parse(record)
  local weight, bytes = string.match(record or '', '^(%S+) (%d+)$')
  weight = tonumber(weight)
  if weight and weight >= 1e-12 and weight <= 1e12 then
    return weight, tonumber(bytes)
  end
end

-- Take the parts of a sequence, or of what is none, out of all keys and count it as damaged.
local function discard(key)
  redis.call('HDEL', DATA, key)
  redis.call('HDEL', WEIGHT, key)
  redis.call('ZREM', CLOCK, key)
  redis.call('ZREM', AGE, key)
  local generation, id = string.match(key, '^(%d+):(.+)$')
  if id and redis.call('HGET', IDS, id) == generation then
    redis.call('HDEL', IDS, id)
  end
  state.rejected, damaged_count = state.rejected + 1, damaged_count + 1
  if damaged_count <= NAMED then
    damaged[damaged_count] = key
  end
end

-- Look at sequences of the age key: add those that have all their parts to the sums, discard the rest. Returns how many
-- have.
local function look_at(keys, generations)
  local ids = {}
  for i, key in ipairs(keys) do
    ids[i] = string.match(key, '^%d+:(.+)$') or ''
  end
  local records, clocks = redis.call('HMGET', WEIGHT, unpack(keys)), redis.call('ZMSCORE', CLOCK, unpack(keys))
  local held, whole = redis.call('HMGET', IDS, unpack(ids)), 0
  for i, key in ipairs(keys) do
    local weight, bytes = parse(records[i])
    if weight and clocks[i] and finite(tonumber(clocks[i])) and tonumber(held[i] or 'none') == generations[i]
        and redis.call('HSTRLEN', DATA, key) == bytes then
      whole = whole + 1
      state.bytes, state.generation = state.bytes + bytes, math.max(state.generation, generations[i])
      add_to_total(weight)
    else
      discard(key)
    end
  end
  return whole
end

-- Whether every key has as many entries as there are sequences. All are asked: one of the wrong type raises an error.
local function is_even()
  local clocks, payloads = redis.call('ZCARD', CLOCK), redis.call('HLEN', DATA)
  local weights, ids = redis.call('HLEN', WEIGHT), redis.call('HLEN', IDS)
  return clocks == size and payloads == size and weights == size and ids == size
end

-- Discard what stands in a key and belongs to no sequence of the age key, all of which are whole.
local function discard_strays()
  for _, members in ipairs({redis.call('ZRANGE', CLOCK, 0, -1), redis.call('HKEYS', DATA), redis.call('HKEYS', WEIGHT)}) do
    for _, key in ipairs(members) do
      local known = redis.call('ZSCORE', AGE, key)
      if not known and (redis.call('ZSCORE', CLOCK, key) or redis.call('HEXISTS', DATA, key) == 1
          or redis.call('HEXISTS', WEIGHT, key) == 1) then
        discard(key)
      end
    end
  end
  local ids = redis.call('HGETALL', IDS)
  for i = 1, #ids, 2 do
    if not redis.call('ZSCORE', AGE, ids[i + 1] .. ':' .. ids[i]) then
      redis.call('HDEL', IDS, ids[i])
    end
  end
end

-- Remove every sequence that is not whole and every part that belongs to none; sum weights and bytes anew. O(n),
-- seconds for a million, and only ever needed when a foreign hand has changed something under our keys.
local function sweep()
  state.total, state.total_low, state.bytes = 0, 0, 0
  local start, step = 0, AT_ONCE / 4
  repeat
    local ages = redis.call('ZRANGE', AGE, start, start + step - 1, 'WITHSCORES')
    local keys, generations = {}, {}
    for i = 1, #ages, 2 do
      keys[#keys + 1], generations[#generations + 1] = ages[i], tonumber(ages[i + 1])
    end
    start = start + (#keys > 0 and look_at(keys, generations) or 0)
  until #keys == 0
  size = start
  if not is_even() then
    discard_strays()
  end
  state.inserted = math.max(state.inserted, size)
end

-- Return the weights and the payload bytes of sequences that must be there; nil, after a sweep, when one is damaged.
local function records_of(keys)
  local weights, bytes = redis.call('HMGET', WEIGHT, unpack(keys)), {}
  for i = 1, #keys do
    weights[i], bytes[i] = parse(weights[i])
    if not weights[i] then
      sweep()
      return nil
    end
  end
  return weights, bytes
end

-- Remove whole sequences, whose records are given, with all that belongs to them.
local function remove(keys, weights, bytes)
  local ids = {}
  for i, key in ipairs(keys) do
    ids[i] = string.match(key, '^%d+:(.+)$')
    add_to_total(-weights[i])
    state.bytes = state.bytes - bytes[i]
  end
  redis.call('HDEL', DATA, unpack(keys))
  redis.call('HDEL', WEIGHT, unpack(keys))
  redis.call('ZREM', CLOCK, unpack(keys))
  redis.call('ZREM', AGE, unpack(keys))
  redis.call('HDEL', IDS, unpack(ids))
  size = size - #keys
end

-- The clocks advance by about 1/total with each draw, and are doubles: of that step, now * total * 1e-16 is lost. So
-- at 1e9 (as many draws, or weights grown by as much) they are turned back until now is 0, in O(n); a step is
-- therefore always known to 1e-7 of its mean. Called before a clock is wound by a total that may have grown.
local function turn_back_if_worn()
  if state.now * state.total <= 1e9 then
    return
  end
  local clocks, turned = redis.call('ZRANGE', CLOCK, 0, -1, 'WITHSCORES'), {}
  for i = 1, #clocks, 2 do
    turned[i], turned[i + 1] = math.max(0, tonumber(clocks[i + 1]) - state.now), clocks[i]
  end
  write('ZADD', CLOCK, turned)
  state.now = 0
end

-- From here on this runs before every script. A key of the wrong type raises an error before anything is written.
local unreadable = read_state()
if unreadable then
  return redis.error_reply('UNREADABLE ' .. unreadable)
end
size = redis.call('ZCARD', AGE)
local untouched = credible and is_even() and state.size == size and (size == 0 or state.total > 0)
