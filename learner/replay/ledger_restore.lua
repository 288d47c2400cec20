-- Add records of episodes that have none; returns how many were added.
-- ARGV: episode and record of each
local added = 0
for i = 1, #ARGV, 2 do
  if redis.call('HEXISTS', DONE, ARGV[i]) == 0 then
    record_once(ARGV[i], ARGV[i + 1], 'restored')
    added = added + 1
  end
end
return added
