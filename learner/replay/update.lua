-- Give sequences new weights; a key that is gone (evicted, or its id in use again) is passed over.
-- The result is how many were found.     ARGV from 3: key, weight, Exp(1) of each
local before = remembered()
if before then
  return answer(before)
end
run_also_when_full()
if not untouched then
  sweep()
end

local place, times = {}, {} -- of a key given twice the last place holds
local keys = {}
for i = 3, #ARGV, 3 do
  local key = ARGV[i]
  if not place[key] then
    keys[#keys + 1] = key
  end
  place[key], times[key] = i, (times[key] or 0) + 1
end

-- Those that are there, with their records.
local function present()
  local here = {}
  for i, record in ipairs(redis.call('HMGET', WEIGHT, unpack(keys))) do
    if record then
      here[#here + 1] = keys[i]
    end
  end
  if #here == 0 then
    return here
  end
  local weights, bytes = records_of(here)
  if not weights then
    return present()
  end
  return here, weights, bytes
end

local found = 0
local here, weights, bytes = present()
local records, clocks = {}, {}
for i, key in ipairs(here) do
  local new = ARGV[place[key] + 1]
  add_to_total(-weights[i])
  add_to_total(tonumber(new))
  records[2 * i - 1], records[2 * i] = key, new .. ' ' .. bytes[i]
  found = found + times[key]
end
turn_back_if_worn()
for i, key in ipairs(here) do
  -- The exponential has no memory: what was left of the old clock may be thrown away.
  local at = place[key]
  clocks[2 * i - 1], clocks[2 * i] = state.now + tonumber(ARGV[at + 2]) / tonumber(ARGV[at + 1]), key
end
write('HSET', WEIGHT, records)
write('ZADD', CLOCK, clocks)
write_state()
return answer(remember(found))
