-- Record a finished episode and its candidates, once; returns 1 if this call did it, 0 if another had.
-- ARGV: episode, token of this call, record, then slot, score, payload, meta of each candidate
local first = redis.call('HEXISTS', DONE, ARGV[1]) == 0
local token = record_once(ARGV[1], ARGV[3], ARGV[2])
if first then
  for i = 4, #ARGV, 4 do
    local slot, best = ARGV[i], redis.call('HGET', SCORES, ARGV[i])
    if not best or tonumber(ARGV[i + 1]) > tonumber(best) then
      redis.call('HSET', SCORES, slot, ARGV[i + 1])
      redis.call('HSET', PAYLOADS, slot, ARGV[i + 2])
      redis.call('HSET', METAS, slot, ARGV[i + 3])
    end
  end
end
return token == ARGV[2] and 1 or 0
