"""Whether other users could have put a file where it lies: asked before code is loaded from it.

As OpenSSH does with the files of its keys: the file and every folder above it belong to this user or to root, and
nobody else may write to them. One thing more is allowed: a folder of root's or this user's with the sticky bit (/tmp),
in which others may make files, but neither rename nor remove what isn't theirs.

In a user namespace that doesn't know root (Apptainer, rootless containers) what is root's seems to belong to the
overflow user. Folders above glassbox's own may; it can't be told from root there.
"""

import os
import stat
from pathlib import Path
from typing import Final

_UID_MAP: Final = Path("/proc/self/uid_map")
_OVERFLOW_UID: Final = Path("/proc/sys/kernel/overflowuid")
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


def distrusted_folder(path: Path, *, shared: bool = False) -> str | None:
    """Why what lies in a folder could be another user's; None if it couldn't. A folder that isn't there yet is judged
    by those above it.

    Links on the way are followed if they are this user's or root's, too.

    Args:
        shared: the folder itself may have the sticky bit, as those above it may: what is looked at is only a way.
    """
    owners = frozenset({os.geteuid(), 0})
    for way in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        for part in (*reversed(way.parents), way):
            try:
                found = part.lstat()
            except FileNotFoundError:
                break
            except OSError as error:
                return f"{part} can't be looked at ({error.strerror})"
            above = shared or part != way
            if (reason := _distrusted(part, found, owners | _unmapped_root() if above else owners, above)) is not None:
                return reason
    return None


def distrusted_file(path: Path) -> str | None:
    """Why a file in a trusted folder could be another user's, or is none; None if it couldn't."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is no regular file"
    return _distrusted(path, found, frozenset({os.geteuid(), 0}), sticky=False)


def _unmapped_root() -> frozenset[int]:
    """The user as whom root is seen if this process's user namespace has no root; none if it has."""
    try:
        if any(line.split()[0] == "0" for line in _UID_MAP.read_text(encoding="ascii").splitlines()):
            return frozenset()
        return frozenset({int(_OVERFLOW_UID.read_text(encoding="ascii"))})
    except (OSError, ValueError, IndexError):
        return frozenset()


def _distrusted(path: Path, found: os.stat_result, owners: frozenset[int], sticky: bool) -> str | None:
    if found.st_uid not in owners:
        return f"{path} belongs to user {found.st_uid}"
    if stat.S_ISLNK(found.st_mode):  # its mode says nothing
        return None
    if found.st_mode & _WRITABLE_BY_OTHERS and not (sticky and found.st_mode & stat.S_ISVTX):
        return f"{path} is writable by other users (mode {stat.S_IMODE(found.st_mode):04o})"
    return None
