"""Files that hold what users said, or what their requests were like: for the server's user alone.

Owns their modes. A file that was there before with a wider mode, as an older glassbox or a `touch` made it, is
narrowed: what is about to be written was not meant for whoever may read it. One that belongs to somebody else is
refused, since its owner could read it whatever its mode.
"""

import errno
import logging
import os
import stat
from pathlib import Path
from typing import Final

from glassbox.core.logs import get_logger, log_once

logger = get_logger(__name__)

FILE_MODE: Final = 0o600
_OTHERS: Final = 0o077


def open_private(path: Path, flags: int) -> int:
    """A descriptor of a file, made if it isn't there. Pipes and devices (/dev/stdout) are taken as they are.

    Args:
        flags: of os.open, beside O_CREAT and O_CLOEXEC.

    Raises:
        PermissionError: it is a file of another user, or a link of one.
        OSError: it can't be opened.
    """
    flags |= os.O_CREAT | os.O_CLOEXEC
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW, FILE_MODE)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        # /dev/stdout is a link; one of another user could lead to any file of this one's.
        if os.lstat(path).st_uid not in (os.geteuid(), 0):
            raise PermissionError(f"{path} must not be another user's link; remove it, or name another file") from None
        handle = os.open(path, flags, FILE_MODE)
    try:
        found = os.fstat(handle)
        if stat.S_ISREG(found.st_mode):
            if found.st_uid != os.geteuid():
                raise PermissionError(
                    f"{path} must belong to user {os.geteuid()}, but belongs to user {found.st_uid}, who could read "
                    "what is written; remove it, or name another file"
                )
            if found.st_mode & _OTHERS:
                os.fchmod(handle, FILE_MODE)
                _tell(path, found.st_mode)
    except OSError:
        os.close(handle)
        raise
    return handle


def narrow(path: Path) -> None:
    """Take a file of this user's away from others; one that isn't there, or isn't this user's, is left alone."""
    try:
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & _OTHERS:
            path.chmod(FILE_MODE)
            _tell(path, found.st_mode)
    except FileNotFoundError:
        return


def _tell(path: Path, mode: int) -> None:
    log_once(
        logger,
        logging.WARNING,
        f"narrowed-{path}",
        "%s had mode %04o and has %04o now: others must not read what requests were like",
        path,
        stat.S_IMODE(mode),
        FILE_MODE,
    )
