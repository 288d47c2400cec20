"""The newest Controller weights, from the learner to the actors.

The payload (from `safetensors.torch.save`) is opaque here; it lies in the frame of `codec.py`, whose tag is the
version, so that a damaged or foreign value is refused before anything tries to load it.
"""

import logging
from typing import Any

import redis
from redis.exceptions import ResponseError

from learner.replay.codec import PayloadError, seal, unseal
from learner.replay.connection import namespace, script

__all__ = ["WeightStore"]

_log = logging.getLogger(__name__)

_MAGIC = b"ZOWT"
_MAX_BYTES = 512 << 20  # Redis's own limit of a string


class WeightStore:
    """The weights of the campaign `prefix`; any number of processes may publish and pull."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        tag = namespace(prefix)
        self._client = client
        self._keys = [f"{tag}:weights:{name}" for name in ("version", "newest")]
        self._publish, self._pull = script(client, "publish.lua"), script(client, "pull.lua")

    def publish(self, version: int, payload: bytes) -> bool:
        """Make `payload` the weights of `version` (>= 0); True when that is now the newest version.

        A version that is not above the newest one changes nothing, so a repeated call is harmless; but what is stored
        and cannot be read is replaced, whatever version it claims.
        """
        if version < 0:
            raise ValueError(f"version must be >= 0, got {version}")
        sealed = seal(_MAGIC, version, payload)
        if len(sealed) > _MAX_BYTES:
            raise ValueError(f"payload must fit into {_MAX_BYTES} bytes with its header, got {len(payload)}")
        if self._published(version, sealed):
            return True
        try:
            self.pull(-1)
        except PayloadError as error:
            _log.warning("weights: what was stored cannot be read and is replaced: %s", error)
            self.clear()
            return self._published(version, sealed)
        return False

    def version(self) -> int | None:
        """Return the newest version without its weights; None before the first, and where it cannot be read."""
        try:
            found: Any = self._client.get(self._keys[0])
            return None if found is None else int(found)
        except (ResponseError, ValueError):
            return None  # `pull` says what is wrong, and the next publication mends it

    def clear(self) -> None:
        """Forget the weights: a learner that goes back to an earlier state publishes lower versions."""
        self._client.delete(*self._keys)

    def _published(self, version: int, sealed: bytes) -> bool:
        newest: Any = self._publish(keys=self._keys, args=[version, sealed])
        return bool(newest == str(version).encode())

    def pull(self, newer_than: int) -> tuple[int, bytes] | None:
        """Return (version, payload) of the newest weights, or None when `newer_than` is as new.

        `newer_than=-1` takes any version. Raises PayloadError when the stored value is damaged.
        """
        try:
            answer: Any = self._pull(keys=self._keys, args=[newer_than])
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            raise PayloadError("weights", expected="two strings", got="a key of another type") from error
        return None if answer is None else _opened(answer[0], answer[1])


def _opened(version: bytes, sealed: bytes | None) -> tuple[int, bytes]:
    found, body = unseal(_MAGIC, sealed or b"", max_bytes=_MAX_BYTES)
    if str(found).encode() != version:
        raise PayloadError(
            "weights", expected=f"version {version[:20].decode(errors='backslashreplace')}", got=f"version {found}"
        )
    return found, bytes(body)
