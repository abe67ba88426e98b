"""Files that other processes read while they are written: replaced whole, and known by their version."""

import contextlib
from pathlib import Path

# (inode, mtime in ns, size) of a file: changes whenever a writer renamed a new file into place.
FileVersion = tuple[int, int, int]


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by a temporary one beside it.

    Raises:
        OSError: if it cannot be written; the temporary file is removed.
    """
    # A fixed name: a worker killed while writing leaves at most one, which its next write would replace.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            view = memoryview(data)
            while view:  # one write may be short when the disk is about to be full
                view = view[file.write(view) :]
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
