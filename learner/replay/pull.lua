-- The newest weights, if they are newer than what the caller has, or if their version is none: {version, sealed
-- payload}, else nil.
-- One script, so that version and payload belong together.
-- KEYS: version, newest     ARGV: version the caller has
local current = redis.call('GET', KEYS[1])
local version = tonumber(current or 'none')
if not current or (version and version <= tonumber(ARGV[1])) then
  return nil
end
return {current, redis.call('GET', KEYS[2])}
