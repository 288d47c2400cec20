-- Store weights unless they are not newer; returns the newest version, or nothing where what lies there is foreign.
-- KEYS: version, newest     ARGV: version, sealed payload
local current = redis.pcall('GET', KEYS[1])
if current and (type(current) == 'table' or not tonumber(current)) then
  return ''
end
if current and tonumber(current) >= tonumber(ARGV[1]) then
  return current
end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
