"""Files that others read and that must not fill the disk: appended to, rotated by size.

Owns `path`, `path.1`, ... and nothing of what is written in them.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from glassbox.export.private_files import narrow, open_private
from glassbox.store.trusted_file import make_folder

KEPT_FILES: Final = 3
BYTES_PER_MB: Final = 1_000_000


class RotatingFile:
    """Appends lines to a file that never grows beyond a size: it becomes `path.1`, that `path.2`, and so on
    to `path.3`.

    Opened for each write, so it may be removed or moved by others (logrotate) at any time. A line is written
    whole or not at all; the rest of a line that somebody was killed in is ended by a line break. Only this user may
    read it, and what it becomes (`private_files.py`).
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = Path(path)
        self._max_bytes = max_bytes
        self._looked_at_older = False

    def append(self, lines: Sequence[str]) -> None:
        """Append lines (without their line breaks).

        Raises:
            OSError: if they cannot be written; nothing of them stays in the file.
        """
        data = "".join(f"{line}\n" for line in lines).encode()
        if not data:
            return
        make_folder(self._path.parent)
        if not self._looked_at_older:
            for number in range(1, KEPT_FILES + 1):
                narrow(self._older(number))
            self._looked_at_older = True
        self._rotate_for(len(data))
        handle = open_private(self._path, os.O_RDWR | os.O_APPEND)
        try:
            status = os.fstat(handle)
            regular = stat.S_ISREG(status.st_mode)
            if regular and status.st_size and os.pread(handle, 1, status.st_size - 1) != b"\n":
                data = b"\n" + data
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(handle, view) :]
            except OSError:
                if regular:
                    os.ftruncate(handle, status.st_size)
                raise
        finally:
            os.close(handle)

    def _rotate_for(self, size: int) -> None:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(status.st_mode) or not status.st_size or status.st_size + size <= self._max_bytes:
            return
        for number in range(KEPT_FILES, 0, -1):
            newer = self._older(number - 1) if number > 1 else self._path
            if newer.exists():
                newer.replace(self._older(number))

    def _older(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
