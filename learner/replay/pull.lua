-- The newest weights, if they are newer than what the caller has: {version, sealed payload} or nil.
-- One script, so that version and payload belong together.
-- KEYS: version, newest     ARGV: version the caller has
local current = redis.call('GET', KEYS[1])
if not current or tonumber(current) <= tonumber(ARGV[1]) then
  return nil
end
return {current, redis.call('GET', KEYS[2])}
