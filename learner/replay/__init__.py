"""What outlives a process, in Redis: the prioritized replay, the episode ledger, the published weights."""
