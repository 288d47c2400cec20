-- Store weights unless they are not newer; returns the newest version.
-- KEYS: version, newest     ARGV: version, sealed payload
local current = redis.call('GET', KEYS[1])
if current and tonumber(current) >= tonumber(ARGV[1]) then
  return current
end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
