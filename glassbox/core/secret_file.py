"""Files that hold secrets, or decide who gets in: read only if nobody else could have read or written them.

Owns the distrust. OpenSSH's rule for keys, but that a group may read: Kubernetes mounts secrets so for users other than
root.
"""

import os
import stat
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 1 << 20
# Others may do nothing, the group may read.
_FORBIDDEN_SECRET: Final = 0o027
_FORBIDDEN_PUBLIC: Final = 0o022


class SecretFileError(ValueError):
    """A file can't be used; the message goes on from its name: rule, value and remedy."""


def read_secret_file(path: Path, *, secret: bool = True) -> bytes:
    """Content of a file that belongs to root or this user, and that others may not change, nor read if it is secret.

    Links are followed, as Kubernetes mounts secrets by them; what is checked is the file that was opened.

    Args:
        path: of the file.
        secret: others may not read it.

    Raises:
        SecretFileError: it can't be read, is no regular file, too large, or not safe.
    """
    try:
        # Not to wait for the writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SecretFileError(f"must be a file that can be read: {error.strerror}; correct it") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise SecretFileError("must be a regular file, got a directory, pipe or device; name a file")
        _check_owner_and_mode(found, secret)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SecretFileError(f"can't be read: {error.strerror}; check the file system") from None
    finally:
        os.close(descriptor)
    if len(content) > MAX_BYTES:
        raise SecretFileError(f"must be at most {MAX_BYTES} bytes, got more; is it the right file?")
    return content


def _check_owner_and_mode(found: os.stat_result, secret: bool) -> None:
    if found.st_uid not in {0, os.geteuid()}:
        raise SecretFileError(
            f"must belong to user {os.geteuid()} or root, got user {found.st_uid}; use chown {os.geteuid()}"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & (_FORBIDDEN_SECRET if secret else _FORBIDDEN_PUBLIC):
        what, remedy = ("read or changed", "600") if secret else ("changed", "644")
        raise SecretFileError(f"must not be {what} by others, got mode {mode:04o}; use chmod {remedy}")
