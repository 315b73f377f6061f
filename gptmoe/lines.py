"""Lines appended to a file as they come; those that a full disk does not take wait for room."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LineFile:
    """Appends lines to a file. Each is on its way to the disk when `append` returns.

    A disk without room costs one warning: the lines wait in memory and are written, whole and in
    order, as soon as there is room. A process that is killed before that takes them along.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = log.warning) -> None:
        self._path = path
        self._warn = warn
        self._waiting = b""
        self._warned = False

    def append(self, line: str) -> None:
        """Write one line, and those that have waited. Raises OSError for all but a full disk."""
        self._waiting += line.encode() + b"\n"
        self._write()

    def close(self) -> None:
        """Try once more to write what waits."""
        if self._waiting:
            self._write()

    def _write(self) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                while self._waiting:  # a disk may take a part of a line: the rest goes on there
                    self._waiting = self._waiting[file.write(self._waiting) :]
            self._warned = False
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            if not self._warned:
                self._warn(f"{self._path} is not written, {error.strerror}: lines wait for room")
            self._warned = True
