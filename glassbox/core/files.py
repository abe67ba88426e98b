"""Files that other processes read while they are written: replaced whole, and known by their version."""

import contextlib
import os
from pathlib import Path

# (inode, mtime in ns, size) of a file: changes whenever a writer renamed a new file into place.
FileVersion = tuple[int, int, int]


def file_version(path: Path) -> FileVersion | None:
    """Version of a file; None if it can't be looked at."""
    try:
        return _version(os.stat(path))
    except OSError:
        return None


def file_versions(folder: Path, prefix: str, suffix: str) -> dict[str, FileVersion]:
    """Name and version of the files of a folder whose names begin and end so; empty if there is no folder.

    Raises:
        OSError: the folder exists but may not be listed.
    """
    versions: dict[str, FileVersion] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and entry.name.endswith(suffix):
                with contextlib.suppress(FileNotFoundError):  # went between listing and stat
                    versions[entry.name] = _version(entry.stat())
    return versions


def _version(found: os.stat_result) -> FileVersion:
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by a temporary one beside it, which only this user may read.

    Raises:
        OSError: if it cannot be written; the temporary file is removed.
    """
    # A fixed name: a worker killed while writing leaves at most one, which its next write would replace.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:  # one write may be short when the disk is about to be full
                view = view[file.write(view) :]
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
