-- What the replay's scripts share; joined in front of each of them. The idea stands in replay.py.
-- KEYS 1 to 7 are, everywhere (the last one is the caller's last result):
local CLOCK, DATA, WEIGHT, AGE, IDS, STATE, LAST = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
-- ARGV 1 and 2 are, everywhere, the request's name and for how many seconds its result is kept.
local REQUEST, KEEP_S = ARGV[1], ARGV[2]

local FIELDS = {
  'now', 'total', 'total_low', 'bytes', 'generation', 'inserted', 'sampled', 'evicted', 'rejected', 'waits', 'batch',
}
local AT_ONCE = 4000 -- values in one command: Lua's `unpack` ends at 8000
local NAMED = 20 -- damaged sequences whose names are returned
local state, size = {}, 0
local damaged, damaged_count = {}, 0

-- Lua would print 14 digits; 17 bring a double back exactly.
local function exact(number)
  return string.format('%.17g', number)
end

local function finite(number)
  return number and number - number == 0
end

-- Call `command key values...` for any number of values, in pairs where the command takes pairs.
local function write(command, key, values)
  for i = 1, #values, AT_ONCE do
    redis.call(command, key, unpack(values, i, math.min(i + AT_ONCE - 1, #values)))
  end
end

-- Read all fields; returns the name of one that is no number, or nil.
local function read_state()
  local values = redis.call('HMGET', STATE, unpack(FIELDS))
  for i, field in ipairs(FIELDS) do
    state[field] = tonumber(values[i] or '0')
    if not finite(state[field]) then
      return field
    end
  end
end

local function write_state()
  local values = {'size', size}
  if size == 0 then
    state.total, state.total_low, state.bytes = 0, 0, 0
  end
  for _, field in ipairs(FIELDS) do
    values[#values + 1], values[#values + 2] = field, exact(state[field])
  end
  redis.call('HSET', STATE, unpack(values))
end

-- Where the server is full, only a script whose first write is a deletion may run to its end.
local function run_also_when_full()
  redis.call('HDEL', STATE, 'none')
end

-- Keep what a request did, for the case that its reply is lost.
local function remember(...)
  redis.call('DEL', LAST)
  redis.call('RPUSH', LAST, REQUEST)
  for _, values in ipairs({...}) do
    write('RPUSH', LAST, values)
  end
  redis.call('EXPIRE', LAST, KEEP_S)
end

local function is_repeated()
  return redis.call('LINDEX', LAST, 0) == REQUEST
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

-- Whether a sequence of the age key has all that belongs to it, undamaged as far as it shows here; with its record.
local function look_at(key, generation)
  local weight, bytes = parse(redis.call('HGET', WEIGHT, key))
  local id = string.match(key, '^%d+:(.+)$')
  local whole = weight and id
    and finite(tonumber(redis.call('ZSCORE', CLOCK, key) or 'none'))
    and redis.call('HSTRLEN', DATA, key) == bytes
    and tonumber(redis.call('HGET', IDS, id) or 'none') == tonumber(generation)
  return whole, weight, bytes
end

-- Take `member` out of `key` unless `whole`, by which it belongs to a sequence; count that sequence as damaged once.
local function take_out(command, key, member, sequence, whole)
  if not whole[sequence] then
    redis.call(command, key, member)
    if whole[sequence] == nil then
      whole[sequence], damaged_count = false, damaged_count + 1
      if damaged_count <= NAMED then
        damaged[damaged_count] = sequence
      end
    end
  end
end

-- Remove every sequence that is not whole and every part that belongs to none; sum weights and bytes anew. O(n),
-- some seconds for a million, and only ever needed when a foreign hand has changed something under our keys.
local function sweep()
  local whole, before = {}, damaged_count
  state.total, state.total_low, state.bytes = 0, 0, 0
  local ages = redis.call('ZRANGE', AGE, 0, -1, 'WITHSCORES')
  for i = 1, #ages, 2 do
    local sound, weight, bytes = look_at(ages[i], ages[i + 1])
    if sound then
      whole[ages[i]], state.bytes = true, state.bytes + bytes
      add_to_total(weight)
      state.generation = math.max(state.generation, tonumber(ages[i + 1]))
    end
  end
  for _, key in ipairs({CLOCK, AGE}) do
    for _, member in ipairs(redis.call('ZRANGE', key, 0, -1)) do
      take_out('ZREM', key, member, member, whole)
    end
  end
  for _, key in ipairs({DATA, WEIGHT}) do
    for _, member in ipairs(redis.call('HKEYS', key)) do
      take_out('HDEL', key, member, member, whole)
    end
  end
  local ids = redis.call('HGETALL', IDS)
  for i = 1, #ids, 2 do
    take_out('HDEL', IDS, ids[i], ids[i + 1] .. ':' .. ids[i], whole)
  end
  size = redis.call('ZCARD', AGE)
  state.inserted = math.max(state.inserted, size)
  state.rejected = state.rejected + damaged_count - before
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
    turned[i], turned[i + 1] = exact(math.max(0, tonumber(clocks[i + 1]) - state.now)), clocks[i]
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
local counts = {redis.call('ZCARD', CLOCK), redis.call('HLEN', DATA), redis.call('HLEN', WEIGHT), redis.call('HLEN', IDS)}
local newest = tonumber(redis.call('ZRANGE', AGE, -1, -1, 'WITHSCORES')[2] or '0')
local untouched = newest <= state.generation and (size == 0 or state.total > 0)
for _, count in ipairs(counts) do
  untouched = untouched and count == size
end
