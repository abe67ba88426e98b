"""Whose the files are that glassbox leaves in prometheus_client's multiprocess directory, and how those of the dead go.

Owns their names and the lock of each owner; what is in them is `export/multiprocess.py`'s. Whoever scrapes a server
shows every file of the directory, so a dead server's would be shown for ever. The owner is in the name, because two
servers may share the directory, and holds a lock as long as it lives, in whatever container that is. It needs no
prometheus_client: the files go also where glassbox is switched off.
"""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from glassbox.store import process_name, rundir

# prometheus_client's: set, the server has several processes whose metrics are files of this directory.
DIRECTORY_ENV: Final = "PROMETHEUS_MULTIPROC_DIR"
# The part of a file's name after the last underscore is the process; gauges also say how processes are combined.
KINDS: Final = ("counter", "gauge_mostrecent", "histogram")
_NAME: Final = re.compile(rf"(?:(?:{'|'.join(KINDS)})_|\.)glassbox-(?P<owner>[0-9a-f]{{16}})\.(?:db|lock)")
_ATTEMPTS: Final = 20


def directory(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The directory, None if there is none.

    Ray takes the variable to nodes where nobody reads such files, nor has made the directory.
    """
    named = environ.get(DIRECTORY_ENV)
    return Path(named) if named and not rundir.is_elsewhere(environ) else None


def owner_of(run_dir: Path) -> str:
    """The owner of the files of the server of a run directory: no two servers have one, and its exporters follow each
    other."""
    return hashlib.sha256(f"{process_name.own_place()} {run_dir.absolute()}".encode()).hexdigest()[:16]


def file_name(kind: str, owner: str) -> str:
    """Of the file of a kind, one of KINDS."""
    return f"{kind}_glassbox-{owner}.db"


def hold(folder: Path, owner: str) -> int | None:
    """Lock an owner's files.

    Returns:
        The descriptor that holds the lock; None if another process has it.

    Raises:
        OSError: it can't be made.
    """
    path = _lock_path(folder, owner)
    for _ in range(_ATTEMPTS):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever cleans up may have removed it between the two.
            if is_held_by(folder, owner, handle):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    return None


def is_held_by(folder: Path, owner: str, handle: int) -> bool:
    """Whether a descriptor of `hold` still holds the lock: not if a cleaner of temporary files removed it."""
    try:
        return os.stat(_lock_path(folder, owner), follow_symlinks=False).st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def release(folder: Path, owner: str, handle: int) -> None:
    """Remove an owner's files, whose lock is held, and let go of it."""
    try:
        for path in (*(folder / file_name(kind, owner) for kind in KINDS), _lock_path(folder, owner)):
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        os.close(handle)


def purge_dead(folder: Path | None) -> None:
    """Remove the files of servers that have ended; those of other users stay, and so does what can't be told."""
    if folder is None:
        return
    for kind in KINDS:
        # What versions before this one have left; one that still runs writes its own anew.
        with contextlib.suppress(OSError):
            (folder / f"{kind}_glassbox.db").unlink()
    for owner in _owners(folder):
        with contextlib.suppress(OSError):  # another user's
            if (handle := hold(folder, owner)) is not None:
                release(folder, owner, handle)


def _owners(folder: Path) -> set[str]:
    with contextlib.suppress(OSError):
        return {match["owner"] for name in os.listdir(folder) if (match := _NAME.fullmatch(name)) is not None}
    return set()


def _lock_path(folder: Path, owner: str) -> Path:
    return folder / f".glassbox-{owner}.lock"
