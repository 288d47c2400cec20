"""The one place where the seeds of a campaign come from."""

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *path: str | int) -> int:
    """A seed for the thing that `path` names, e.g. `derive_seed(7, "retrain", step)`; range [0, 2**62).

    Different paths give independent seeds, and the same path always the same one.
    """
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 2
