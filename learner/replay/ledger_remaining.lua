-- How many episodes are pending or leased, at one moment. A script, since redis-server 7 queues no MULTI when it is full.
return redis.call('ZCARD', PENDING) + redis.call('ZCARD', LEASES)
