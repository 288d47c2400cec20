"""What the workers with their data on a Redis server have in common."""

import redis

from benchmarks.replay_systems.protocol import Store

_COUNTED = ("total_net_input_bytes", "total_net_output_bytes", "total_commands_processed")


class OnRedis(Store):
    """A store on a server of its own."""

    def __init__(self, url: str) -> None:
        self._admin = redis.Redis.from_url(url)
        self._pid = int(self._admin.info("server")["process_id"])

    def open(self, capacity: int) -> None:
        """Empty the server."""
        self._admin.flushall()

    def server_pid(self) -> int:
        """Asked once: a server that had to be started again is an error of the run."""
        return self._pid

    def used_bytes(self) -> int:
        """Redis's own count of what it allocated."""
        return int(self._admin.info("memory")["used_memory"])

    def counters(self) -> dict[str, int]:
        """Bytes in and out, and commands, those within scripts too."""
        stats = self._admin.info("stats")
        return {name: int(stats[name]) for name in _COUNTED}

    def busy(self) -> bool:
        """Whether the append-only file is being rewritten, which takes a core of its own."""
        info = self._admin.info("persistence")
        return bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])
