"""Opens what a user names to be read: only files, and without waiting for whoever writes to a pipe."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from glassbox.view.measured import ViewError


def open_file(path: Path, max_bytes: int, remedy: str) -> BinaryIO:
    """A file, to be read.

    Args:
        max_bytes: a larger one is refused.
        remedy: what the message ends with.

    Raises:
        ViewError: it isn't there, can't be read, is no regular file or too large.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ViewError(f"can't read {path}: {reason}; {remedy}") from None
    found = os.fstat(handle)
    problem = None
    if stat.S_ISDIR(found.st_mode):
        problem = "Is a directory"
    elif not stat.S_ISREG(found.st_mode):
        problem = "is a pipe or a device, which may have no end"
    elif found.st_size > max_bytes:
        problem = f"is larger than {max_bytes >> 20} MB"
    if problem is not None:
        os.close(handle)
        raise ViewError(f"can't read {path}: {problem}; {remedy}")
    return os.fdopen(handle, "rb")
