-- Take back draws whose payload did not decode: they do not count as sampled, and the sequences are removed.
-- The result is how many were removed.     ARGV from 3: key and how often it was drawn, of each
local before = remembered()
if before then
  return answer(before)
end
run_also_when_full()
if not untouched then
  sweep()
end
local removed = 0
for i = 3, #ARGV, 2 do
  local key = ARGV[i]
  local weight, bytes = parse(redis.call('HGET', WEIGHT, key))
  if weight then
    remove({key}, {weight}, {bytes})
    removed = removed + 1
  end
  state.sampled = state.sampled - tonumber(ARGV[i + 1])
end
state.rejected = state.rejected + removed
write_state()
return answer(remember(removed))
