"""Reading and writing what the processes of one server leave each other, without trusting that it is theirs.

Every file of the run directory is read and written here. Who may write to such a file, or may put another one in its
place, decides what `/metrics` shows and what memory it takes, so of the folder and of the file are looked at, before a
byte is read: the kind (a pipe would block its reader for good, a device may do anything), the owner, the mode and the
size. Neither may be a link. The file is held open meanwhile, so that it can't become another one in between.

What may lie in a run directory is small or bounded by the configuration; each reader says how much it takes.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from glassbox.core.files import FileVersion, version_of, write_in

# Of the small ones: notes and statuses.
MAX_NOTE_BYTES: Final = 1 << 20
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
_KINDS: Final = {
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFDIR: "directory",
    stat.S_IFREG: "file",
}
_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700
_REMEDY: Final = "remove it, or set GLASSBOX_RUN_DIR to a directory of this user's"


class DistrustError(OSError):
    """A file or folder is not what a process of this user leaves; the message says what of it."""


@contextlib.contextmanager
def open_file(path: Path, limit: int, *, named: bool = False) -> Iterator[BinaryIO]:
    """A file, open for reading, that belongs to this user (or root), in a folder that does.

    Args:
        limit: bytes that it may have.
        named: the folder was named by whoever runs a command, and may be another user's: it is his whose the folder is.

    Raises:
        DistrustError: it isn't, or is no regular file, or is larger, or others may write to it.
        OSError: it can't be opened.
    """
    handle, found = open_descriptor(path, named=named)
    with os.fdopen(handle, "rb") as file:
        if found.st_size > limit:
            raise DistrustError(f"{path} must have at most {limit} bytes, got {found.st_size}; {_REMEDY}")
        yield file


def open_descriptor(path: Path, *, named: bool = False) -> tuple[int, os.stat_result]:
    """Such a file whatever its size, for whoever reads parts of it and closes it later; and what is known of it.

    Raises:
        OSError: as for `open_file`.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _open_folder(path.parent, named) as (folder, owners):
        # Looked at before it is opened, too: to open a device can be enough to make it do something.
        _check_file(path, os.stat(path.name, dir_fd=folder, follow_symlinks=False), owners)
        handle = os.open(path.name, flags, dir_fd=folder)
    return _checked(handle, path, owners)


def read_file(path: Path, limit: int, *, named: bool = False) -> bytes:
    """The bytes of such a file.

    Raises:
        OSError: as for `open_file`, also if it grows beyond `limit` while it is read.
    """
    with open_file(path, limit, named=named) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DistrustError(f"{path} must have at most {limit} bytes, got more while it was read; {_REMEDY}")
    return data


def read_json(path: Path, limit: int = MAX_NOTE_BYTES) -> Any:
    """What a file of JSON holds.

    Raises:
        OSError: as for `read_file`.
        ValueError: it is no JSON, or nested too deeply.
    """
    data = read_file(path, limit)
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


def list_files(folder: Path, prefix: str, suffix: str, *, named: bool = False) -> dict[str, FileVersion]:
    """Name and version of what lies in a folder under names that begin and end so; empty if there is no folder.

    Links are not followed: such an entry has the version of the link, and `open_file` refuses it.

    Raises:
        OSError: the folder may not be listed, or is not this user's.
    """
    versions: dict[str, FileVersion] = {}
    with (
        contextlib.suppress(FileNotFoundError),
        _open_folder(folder, named) as (handle, _),
        os.scandir(handle) as entries,
    ):
        for entry in entries:
            if entry.name.startswith(prefix) and entry.name.endswith(suffix):
                with contextlib.suppress(FileNotFoundError):  # went between listing and stat
                    versions[entry.name] = version_of(entry.stat(follow_symlinks=False))
    return versions


def exists(path: Path) -> bool:
    """Whether there is such a file, as `open_file` would take it."""
    try:
        with open_file(path, MAX_NOTE_BYTES):
            return True
    except OSError:
        return False


def write_file(path: Path, data: bytes | memoryview | Iterable[bytes]) -> None:
    """Replace a file, for this user only (0600).

    Args:
        data: of the file, or its pieces, as `files.write_in` takes them.

    Raises:
        DistrustError: the folder is not this user's.
        OSError: it can't be written; the older file stays, and nothing else is left.
    """
    with _open_folder(path.parent, named=False) as (folder, _):
        write_in(folder, path.name, data, mode=_MODE)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, for this user only; one that is there stays as it is.

    Raises:
        OSError: it can't be made.
    """
    # Path.mkdir gives its mode to the last one alone.
    for missing in reversed([folder for folder in path.parents if not folder.exists()]):
        missing.mkdir(mode=_FOLDER_MODE, exist_ok=True)
    path.mkdir(mode=_FOLDER_MODE, exist_ok=True)


def open_lock(path: Path, *, create: bool) -> int:
    """A file, open for locking (and for reading and writing), which is made if `create` says so.

    Raises:
        FileNotFoundError: there is none.
        DistrustError, OSError: as for `open_file`.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    with _open_folder(path.parent, named=False) as (folder, owners):
        with contextlib.suppress(FileNotFoundError):
            _check_file(path, os.stat(path.name, dir_fd=folder, follow_symlinks=False), owners)
        handle = os.open(path.name, flags, _MODE, dir_fd=folder)
    return _checked(handle, path, owners)[0]


@contextlib.contextmanager
def _open_folder(path: Path, named: bool) -> Iterator[tuple[int, frozenset[int]]]:
    """A folder's descriptor, and the users whose files in it are trusted."""
    kind = os.O_DIRECTORY | (0 if named else os.O_NOFOLLOW)
    try:
        handle = os.open(path, os.O_RDONLY | kind | os.O_CLOEXEC)
    except NotADirectoryError:
        raise DistrustError(f"{path} must be a directory, not a {_kind(os.lstat(path))}; {_REMEDY}") from None
    try:
        found = os.fstat(handle)
        owners = frozenset({os.geteuid(), 0} | ({found.st_uid} if named else set()))
        _check_owner(path, found, owners)
        yield handle, owners
    finally:
        os.close(handle)


def _checked(handle: int, path: Path, owners: frozenset[int]) -> tuple[int, os.stat_result]:
    """The descriptor, which is closed if its file is not trusted, and what was looked at."""
    try:
        found = os.fstat(handle)
        _check_file(path, found, owners)
    except BaseException:
        os.close(handle)
        raise
    return handle, found


def _check_file(path: Path, found: os.stat_result, owners: frozenset[int]) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise DistrustError(f"{path} must be a regular file, not a {_kind(found)}; {_REMEDY}")
    _check_owner(path, found, owners)


def _check_owner(path: Path, found: os.stat_result, owners: frozenset[int]) -> None:
    if found.st_uid not in owners:
        raise DistrustError(
            f"{path} must belong to user {os.geteuid()}, but belongs to user {found.st_uid}, who could forge it; "
            f"{_REMEDY}"
        )
    if found.st_mode & _WRITABLE_BY_OTHERS:
        mode = stat.S_IMODE(found.st_mode)
        raise DistrustError(f"{path} must not be writable by other users, but has mode {mode:04o}; chmod go-w {path}")


def _kind(found: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(found.st_mode), "special file")
