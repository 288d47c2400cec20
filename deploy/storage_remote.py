"""The files at a storage's URI: s3://, gs://, abfs://, hdfs:// or file://, by pyarrow.

Called by deploy/storage.py, deploy/storage_copy.py, and as the place of a deploy/storage_hold.py.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import parse_qs, urlsplit

import pyarrow
from pyarrow import fs

from env.errors import UserError, first_line

__all__ = ["TROUBLE", "Remote"]

TROUBLE = (OSError, pyarrow.ArrowException)  # of a storage
#: Storages in which a file is there when it is written to its end; elsewhere it is moved into place.
_AT_ONCE_WHOLE = ("s3", "gcs", "abfs")


class Remote:
    """The files below a URI. What is not said to raise otherwise raises one of `TROUBLE` where that cannot be done."""

    def __init__(self, uri: str) -> None:
        """UserError where the URI means nothing."""
        self.uri = uri.rstrip("/")
        try:
            self._there, self._root = fs.FileSystem.from_uri(self.uri)
        except (*TROUBLE, ValueError) as error:
            raise self.unusable(error) from error
        self._is_whole_at_once = self._there.type_name in _AT_ONCE_WHOLE

    @property
    def name(self) -> str:
        """Of the folder there."""
        return self._root.rpartition("/")[2] or "campaign"

    @property
    def key(self) -> str:
        """What tells the place from all others, but not two ways to write it: no password, no region."""
        parts = urlsplit(self.uri)
        place = re.sub(r":[^@]*@", "@", parts.netloc), parse_qs(parts.query).get("endpoint_override")
        return hashlib.sha256(f"{parts.scheme} {place} {self._root}".encode()).hexdigest()[:12]

    def make(self) -> None:
        """Have a folder there, where the storage knows such."""
        if not self._is_whole_at_once:
            self._there.create_dir(self._root, recursive=True)

    def write(self, name: str, content: bytes) -> None:
        """Write a file in the folder there: all of it, or it is as it was."""
        final = f"{self._root}/{name}"
        path = final if self._is_whole_at_once else f"{final}.part"
        if not self._is_whole_at_once:
            # but for the first of them, which a disk that is away lacks
            for parent in [*PurePosixPath(name).parents][-2::-1]:
                self._there.create_dir(f"{self._root}/{parent}", recursive=False)
        with self._there.open_output_stream(path) as stream:
            stream.write(content)
        if path != final:
            self._there.move(path, final)

    def read(self, name: str) -> bytes:
        """Read a file there."""
        with self._there.open_input_stream(f"{self._root}/{name}") as stream:
            return bytes(stream.read())

    def delete(self, name: str) -> None:
        """Delete a file there."""
        self._there.delete_file(f"{self._root}/{name}")

    def files(self) -> dict[str, fs.FileInfo]:
        """By name, all that are there; none where there is no such folder."""
        found = self._there.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        return {info.path[len(self._root) :].lstrip("/"): info for info in found if info.is_file}

    @contextlib.contextmanager
    def trouble_named(self) -> Iterator[None]:
        """UserError where the storage cannot be used."""
        try:
            yield
        except TROUBLE as error:
            raise self.unusable(error) from error

    def unusable(self, error: Exception) -> UserError:
        """What to say of a URI where nothing can be done."""
        return UserError(
            self.uri,
            expected="a storage URI that can be read and written, e.g. s3://BUCKET/FOLDER",
            got=first_line(error) or repr(error),
            remedy="correct the URI, the credentials (as of the cloud's own tools) or the network",
        )
