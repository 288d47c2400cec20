-- Draw k sequences with replacement: the next k rings of the race. The result is {1, keys, probabilities}, or
-- {0, inserted, sampled} when the learner must wait. The caller reads the payloads with a plain HMGET: through a script
-- they would be copied twice more, which takes longer than everything here.
-- ARGV from 3: k, batch (what the learner asked for), min_sequences, replay_ratio, tolerance, then k times Exp(1)
local k, waits = tonumber(ARGV[3]), 7

local before = remembered()
if before then
  return answer(before)
end
run_also_when_full()
if not untouched then
  sweep()
end
state.batch = tonumber(ARGV[4])

local function refused()
  state.waits = state.waits + 1
  write_state()
  return answer({0, state.inserted, state.sampled})
end

-- The k sequences that ring first (all, where there are fewer), by time: keys, times, weights.
local function candidates()
  local keys, times, sound = {}, {}, true
  local clocks = redis.call('ZRANGE', CLOCK, 0, k - 1, 'WITHSCORES')
  for i = 1, #clocks, 2 do
    keys[#keys + 1], times[#times + 1] = clocks[i], tonumber(clocks[i + 1])
    sound = sound and finite(times[#times])
  end
  if #keys == 0 then
    return keys
  end
  if not sound then
    sweep()
    return candidates()
  end
  local weights = records_of(keys)
  if not weights then
    return candidates()
  end
  return keys, times, weights
end

if state.inserted < tonumber(ARGV[5])
    or state.sampled + k > state.inserted * tonumber(ARGV[6]) + tonumber(ARGV[7]) then
  return refused()
end
turn_back_if_worn()
local keys, ring, weights = candidates()
if #keys == 0 then
  return refused()
end

-- A draw takes the earliest ring of all and winds that clock again. No sequence but the candidates can be among the
-- next k draws: each of the k rings at or before the horizon, the last one's time, which makes k rings up to there,
-- and every other sequence rings later. For the same reason a clock wound again beyond the horizon needs no more
-- attention; the others stand in `again`, the earliest last, and compete with the next candidate.
local horizon = #keys == k and ring[k] or math.huge
local again, pending, next_candidate = {}, 0, 1
local names, probabilities = {}, {}
for draw = 1, k do
  local i
  if pending > 0 and (next_candidate > #keys or ring[again[pending]] < ring[next_candidate]) then
    i, pending = again[pending], pending - 1
  else
    i, next_candidate = next_candidate, next_candidate + 1
  end
  state.now = math.max(state.now, ring[i])
  ring[i] = state.now + tonumber(ARGV[waits + draw]) / weights[i]
  names[draw], probabilities[draw] = keys[i], string.format('%.17g', math.min(1, weights[i] / state.total))
  if ring[i] <= horizon then
    local at = pending
    while at > 0 and ring[again[at]] < ring[i] do
      again[at + 1], at = again[at], at - 1
    end
    again[at + 1], pending = i, pending + 1
  end
end

local wound = {}
for i = 1, next_candidate - 1 do
  wound[2 * i - 1], wound[2 * i] = ring[i], keys[i]
end
write('ZADD', CLOCK, wound)
state.sampled = state.sampled + k
write_state()
return answer(remember({1, names, probabilities}))
