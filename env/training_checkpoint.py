"""The checkpoint of a whole training: replaced after an epoch, and only the same training goes on from it.

Its learning rate and the schedule of it, and the precision, may be changed on the way, for a training whose loss became
NaN or infinite.

Called by `env/training.py`.
"""

import copy
import io
import json
import logging
import time
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from env.data import DataConfig, Dataset
from env.errors import UserError
from env.files import replace_file

__all__ = ["Checkpoint", "FileStore", "Resumable", "Store"]

_LOG = logging.getLogger(__name__)
#: Settings that a training may go on with changed: what is tried after a loss that is not finite.
_FREE = ("train.learning_rate", "train.warmup_share", "train.schedule", "train.precision")
#: A checkpoint larger than this is not written more often: a GPU's epoch of a large network is soon over.
_LARGE_BYTES, _REST_S = 32 * 2**20, 10.0


class Resumable(Protocol):
    """Something whose whole state torch can save, and read with `weights_only`."""

    def state_dict(self) -> dict[str, Any]:
        """All that it changes."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be as when `state` was taken."""


class Store(Protocol):
    """Where a checkpoint is kept; as a string, what people call it."""

    def read(self) -> bytes | None:
        """What was written last; None where nothing was."""

    def write(self, data: bytes | memoryview) -> None:
        """Keep `data` in place of what was there; OSError when that cannot be, with nothing changed."""


class FileStore:
    """A file, in a folder that is made if need be."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read(self) -> bytes | None:
        """See `Store`."""
        return self._path.read_bytes() if self._path.exists() else None

    def write(self, data: bytes | memoryview) -> None:
        """See `Store`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(self._path) as temporary:
            temporary.write_bytes(data)


class Checkpoint:
    """What is kept of one training, told from others by all that its course depends on."""

    def __init__(
        self,
        store: Store,
        network: nn.Module,
        dataset: Dataset,
        data_config: DataConfig,
        config: Any,
        *,
        defaults: Any,
        seed: int,
        section: str,
    ) -> None:
        """Take what `env.training.train` was given; `config` is its TrainConfig, `section` the name in messages.

        `defaults` is what fields stood at that are younger than what is in `store`.
        """
        shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
        self._store, self._section = store, section
        self._bytes, self._saved_s = 0, 0.0
        self._defaults = _fields(defaults)
        self._identity = {
            **_fields(config),
            "data.flip": json.dumps(data_config.flip),
            "data.shift_pixels": json.dumps(data_config.shift_pixels),
            "seed": json.dumps(seed),
            "training images": json.dumps([len(dataset.train), *dataset.image_shape]),
            "network": json.dumps(shapes),
        }

    def is_due(self) -> bool:
        """Whether an epoch that has ended is worth a `save`: always, unless what is kept is large and new."""
        return self._bytes <= _LARGE_BYTES or time.monotonic() - self._saved_s >= _REST_S

    def save(self, training: Resumable) -> None:
        """Replace what is kept; UserError when the disk does not take it."""
        buffer = io.BytesIO()  # torch's own writer says of a full disk only that an assertion failed
        torch.save({"identity": self._identity, **training.state_dict()}, buffer)
        try:
            self._store.write(buffer.getbuffer())
            self._bytes, self._saved_s = buffer.tell(), time.monotonic()
        except OSError as error:
            raise UserError(
                f"checkpoint {self._store}",
                expected=f"{buffer.tell():,} bytes of disk that can be written",
                got=error.strerror or repr(error),
                remedy="make room there and resume; the epochs before it are kept",
            ) from error

    def restore(self, training: Resumable) -> None:
        """Bring `training` to where it was saved, or leave it as it is where nothing was, or that is broken.

        What is broken is logged, and so is a setting that is changed; UserError when it is of another training.
        """
        before = copy.deepcopy(training.state_dict())
        try:
            data = self._store.read()
            if data is None:
                return
            state = _read(data)
            self._check(state["identity"])
            training.load_state_dict(state)
        except UserError:
            raise
        except Exception as error:  # foreign bytes make torch's unpickler raise nearly anything
            _LOG.warning("checkpoint %s is broken (%s): training starts again", self._store, error)
            training.load_state_dict(before)

    def _check(self, stored: Mapping[str, str]) -> None:
        # A field that is younger than the checkpoint stood at its default, which changes nothing.
        known = {**self._defaults, **stored}
        changed = {name: wanted for name, wanted in self._identity.items() if known.get(name) != wanted}
        for name in sorted(changed, key=lambda name: name in _FREE):  # what is refused comes first
            before, wanted = _short(known.get(name, "nothing")), _short(changed[name])
            shown = name.replace("train.", f"{self._section}.")
            if name not in _FREE:
                raise UserError(
                    f"checkpoint {self._store}",
                    expected=f"this training, with {shown} {wanted}",
                    got=before,
                    remedy="remove that file to train anew, or set the former value again",
                )
            _LOG.warning(
                "checkpoint %s: training goes on with %s %s, before it was %s", self._store, shown, wanted, before
            )


def _fields(config: Any) -> dict[str, str]:
    return {f"train.{name}": json.dumps(value) for name, value in asdict(config).items()}


def _read(data: bytes) -> Mapping[str, Any]:
    """The saved state on the CPU, or nearly any exception."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load does not check the sums that torch.save wrote
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"checksum of {damaged} does not agree")
    state: Mapping[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
