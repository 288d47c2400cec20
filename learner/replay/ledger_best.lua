-- The best candidate of a slot, all three fields of one moment, or nil.     ARGV: slot
local score = redis.call('HGET', SCORES, ARGV[1])
if not score then
  return nil
end
return {score, redis.call('HGET', PAYLOADS, ARGV[1]), redis.call('HGET', METAS, ARGV[1])}
