-- Store weights unless they are not newer; returns the newest version.
-- KEYS: version, newest, first     ARGV: version, sealed payload
local current = redis.call('GET', KEYS[1])
if ARGV[1] == '0' and redis.call('EXISTS', KEYS[3]) == 0 then
  redis.call('SET', KEYS[3], ARGV[2])
end
if current and tonumber(current) >= tonumber(ARGV[1]) then
  return current
end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
