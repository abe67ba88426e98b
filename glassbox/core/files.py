"""Files that others write or read meanwhile: replaced whole, known by their version, and opened without waiting."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, cast

# (inode, mtime in ns, size) of a file: changes whenever a writer renamed a new file into place.
FileVersion = tuple[int, int, int]


def file_version(path: Path) -> FileVersion | None:
    """Version of a file; None if it can't be looked at."""
    try:
        return version_of(os.stat(path))
    except OSError:
        return None


def version_of(found: os.stat_result) -> FileVersion:
    """Version of a file of which this is known."""
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def open_regular(path: Path, max_bytes: int) -> BinaryIO:
    """A file that somebody has named, open for reading: without waiting for whoever writes to a pipe.

    Raises:
        OSError: it isn't there, can't be read, is no regular file or too large; `strerror` says which.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:  # a path with a NUL
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    found = os.fstat(handle)
    problem = None
    if stat.S_ISDIR(found.st_mode):
        problem = errno.EISDIR, "Is a directory"
    elif not stat.S_ISREG(found.st_mode):
        problem = errno.EINVAL, "is a pipe or a device, which may have no end"
    elif found.st_size > max_bytes:
        size = f"{max_bytes >> 20} MB" if max_bytes >> 20 else f"{max_bytes} bytes"
        problem = errno.EFBIG, f"is larger than {size}"
    if problem is not None:
        os.close(handle)
        raise OSError(*problem, str(path))
    return os.fdopen(handle, "rb")


class ForeignFileError(Exception):
    """Another user could have written a file; the message goes on from its name: rule, value and remedy."""


def open_own(path: Path, max_bytes: int) -> BinaryIO:
    """The same of a file that decides what a server does, as `require_own` has it.

    Raises:
        OSError: as for `open_regular`.
        ForeignFileError: it isn't.
    """
    file = open_regular(path, max_bytes)
    try:
        require_own(path, os.fstat(file.fileno()))
    except ForeignFileError:
        file.close()
        raise
    return file


def own_version(path: Path) -> FileVersion | None:
    """Version of a file that `open_own` opens, which is another one with its owner and mode, too."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_ino, found.st_ctime_ns, found.st_size)


def require_own(path: Path, found: os.stat_result) -> None:
    """See that nobody but those whom its place was left to could have written a file.

    Not everybody may write to it; its group may, which those who share a folder of models have chosen. Where everybody
    may put files, as in /tmp, it must be this user's or root's. Elsewhere it may be another's: one that is mounted into
    a container belongs to whoever has mounted it.

    Args:
        path: of the file.
        found: what is known of it.

    Raises:
        ForeignFileError: it isn't so.
        OSError: its folder can't be looked at.
    """
    mode = stat.S_IMODE(found.st_mode)
    if mode & stat.S_IWOTH:
        raise ForeignFileError(f"must not be writable by everybody, got mode {mode:04o}; use chmod o-w")
    user, folder = os.geteuid(), path.resolve().parent
    if found.st_uid not in {0, user} and folder.stat().st_mode & stat.S_IWOTH:
        raise ForeignFileError(
            f"must belong to user {user} or root in {folder}, where everybody may put files, got user {found.st_uid}; "
            f"move it, or use chown {user}"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by a temporary one beside it, which only this user may read.

    Raises:
        OSError: if it cannot be written; the temporary file is removed.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        write_in(folder, path.name, data)
    finally:
        os.close(folder)


def write_in(folder: int, name: str, data: bytes | memoryview | Iterable[bytes], *, mode: int = 0o666) -> None:
    """Replace the file `name` of an open folder.

    Args:
        folder: its descriptor.
        data: of the file, or its pieces, each of which is written before the next one is asked for.
        mode: of the file, before the umask.

    Raises:
        OSError: if it cannot be written; the temporary file is removed.
    """
    # A fixed name: a worker killed while writing leaves at most one, which its next write removes.
    temporary = f".{name}.tmp"
    # Exclusively: what another user may have put in its place (a link to a file of ours) is not written to.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            handle = os.open(temporary, flags, mode, dir_fd=folder)
        except FileExistsError:
            os.unlink(temporary, dir_fd=folder)
            handle = os.open(temporary, flags, mode, dir_fd=folder)
        with os.fdopen(handle, "wb", buffering=0) as file:
            for piece in _pieces(data):
                view = memoryview(piece)
                while view:  # one write may be short when the disk is about to be full
                    view = view[file.write(view) :]
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:  # also of whoever makes the pieces
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def _pieces(data: bytes | memoryview | Iterable[bytes]) -> Iterable[bytes | memoryview]:
    """Whatever lends its memory is one piece: a buffer of Arrow's, too, which would else be a row of numbers."""
    try:
        return (memoryview(cast(bytes, data)),)
    except TypeError:
        return cast("Iterable[bytes]", data)
