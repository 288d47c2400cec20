-- What the ledger's scripts share; joined in front of each of them. KEYS 1 to 11 are, everywhere:
local META, PENDING, LEASES, OWNERS, CLAIMS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local DONE, RECORDS, SCORES, PAYLOADS, METAS = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local SNAPSHOTS = KEYS[11]

-- Milliseconds by the server's clock: the only one that all owners share.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Deletions only, and called before every write: a server that is full lets such a script run to its end.
local function forget_lease(id)
  redis.call('ZREM', LEASES, id)
  redis.call('HDEL', OWNERS, id)
end

-- Append the record unless the episode has one; returns the token of the call that completed it.
local function record_once(id, record, token)
  local first = redis.call('HGET', DONE, id)
  if first then
    return first
  end
  forget_lease(id)
  redis.call('HDEL', SNAPSHOTS, id)
  redis.call('ZREM', PENDING, id)
  redis.call('HSET', DONE, id, token)
  redis.call('RPUSH', RECORDS, record)
  return token
end
