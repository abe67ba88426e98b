"""The lock that makes one process the exporter of a server, a file of its run directory.

The file's time of change is the exporter's last sign of life: touching it takes no room, whatever else fills the disk.
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import Final

from glassbox.store.trusted_file import open_lock

LOCK_NAME: Final = "exporter.lock"
# A worker looks whether the lock is free by taking it for an instant; an exporter that starts then tries
# again.
_LOCK_ATTEMPTS: Final = 4
_LOCK_PAUSE_S: Final = 0.03


class ExporterLock:
    """The lock file of a run directory; whoever holds it is the server's exporter."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path = path
        self._handle = handle

    @classmethod
    def acquire(cls, run_dir: Path) -> "ExporterLock | None":
        """Take the lock; None if another process holds it.

        Raises:
            OSError: if the lock file cannot be made.
        """
        path = Path(run_dir) / LOCK_NAME
        handle = open_lock(path, create=True)
        for attempt in range(_LOCK_ATTEMPTS):
            if attempt:
                time.sleep(_LOCK_PAUSE_S)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock = cls(path, handle)
                lock.beat()
                return lock
        os.close(handle)
        return None

    @staticmethod
    def is_held(run_dir: Path) -> bool:
        """True if some process holds the lock.

        Raises:
            OSError: the lock file is not this user's, or no file.
        """
        try:
            handle = open_lock(Path(run_dir) / LOCK_NAME, create=False)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)  # gives the lock back
        return False

    def beat(self) -> None:
        """Give a sign of life."""
        with contextlib.suppress(OSError):  # a disk that went read-only: then it is silence that is seen
            os.utime(self._handle)

    @staticmethod
    def last_beat_s(run_dir: Path) -> float | None:
        """Unix time of the exporter's last sign of life; None if there has never been one."""
        try:
            return os.stat(Path(run_dir) / LOCK_NAME, follow_symlinks=False).st_mtime
        except OSError:
            return None

    @staticmethod
    def holder(run_dir: Path) -> int | None:
        """Process id of who holds the lock, as the kernel tells; None if it is nobody, or nobody that is seen here."""
        try:
            inode = os.stat(Path(run_dir) / LOCK_NAME, follow_symlinks=False).st_ino
            locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        for line in locks:  # "7: FLOCK  ADVISORY  WRITE 4711 00:2d:1234 0 EOF"
            fields = line.split()
            if fields[1:4] == ["FLOCK", "ADVISORY", "WRITE"] and fields[5].rpartition(":")[2] == str(inode):
                return int(fields[4]) or None
        return None

    def renew(self) -> bool:
        """Keep the lock although a cleaner of temporary files removed it.

        Returns:
            False if another process has taken it.
        """
        try:
            if os.stat(self._path, follow_symlinks=False).st_ino == os.fstat(self._handle).st_ino:
                return True
        except FileNotFoundError:
            if not self._path.parent.is_dir():
                return True  # there is nothing to be the exporter of, until a worker makes the directory again
        again = ExporterLock.acquire(self._path.parent)
        if again is None:
            return False
        os.close(self._handle)
        self._handle = again._handle
        return True

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._handle)
