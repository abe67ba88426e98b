"""The run directory: where the processes of one server leave their snapshots for each other.

Owns its name, making and removal; what lies in it belongs to the other modules of this room, and whose a directory is
that an operator named to `ownership.py`. The first process of a server names it in GLASSBOX_RUN_DIR, its children
inherit the variable.

    $XDG_RUNTIME_DIR (or the temporary directory) / glassbox-<uid>-<process>-<random>

The process (process_name.py) is the owner. The random part is there because anybody may make a file in the temporary
directory: a name that could be foretold could be taken first. Ray takes the variable to other nodes, where all workers
of the server share a directory of that name, each node its own.
"""

import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final

from glassbox.store import process_name

RUN_DIR_ENV: Final = "GLASSBOX_RUN_DIR"
_NAME: Final = re.compile(rf"glassbox-(?P<uid>\d+)-(?P<server>(?P<process>{process_name.PATTERN})-[0-9a-f]{{16}})")
# Of a directory whose owner can't be looked for: a living worker writes into it at least once an hour.
_ABANDONED_S: Final = 24 * 3600.0


def run_dir(environ: MutableMapping[str, str] = os.environ) -> Path:
    """Path of this server's run directory, which need not exist yet.

    The first call, in the server's first process, chooses it and sets GLASSBOX_RUN_DIR for the processes to
    come. If these run elsewhere (`is_elsewhere`), it is one of the same name where theirs are: the path may be
    nobody's there, or somebody else's.
    """
    if not environ.get(RUN_DIR_ENV):
        environ[RUN_DIR_ENV] = str(path_of(new_server(), environ))
    path = Path(environ[RUN_DIR_ENV]).absolute()
    return _base(environ) / path.name if is_elsewhere(environ) else path


def new_server() -> str:
    """A name for the server whose first process this is; nobody can foretell it."""
    return f"{process_name.own_name()}-{secrets.token_hex(8)}"


def path_of(server: str, environ: Mapping[str, str]) -> Path:
    """The run directory of a server of this name, unless an operator named another one."""
    return _base(environ) / f"glassbox-{os.geteuid()}-{server}"


def is_named(environ: Mapping[str, str]) -> bool:
    """True if GLASSBOX_RUN_DIR is an operator's choice."""
    named = environ.get(RUN_DIR_ENV, "")
    return bool(named) and _NAME.fullmatch(Path(named).name) is None


def is_elsewhere(environ: Mapping[str, str] = os.environ) -> bool:
    """True if the server's first process is on another machine, or in another container, as Ray's workers may find.

    False if there is none yet, and for a directory that an operator named.
    """
    match = _NAME.fullmatch(Path(environ.get(RUN_DIR_ENV, "")).name)
    return match is not None and match["place"] != process_name.own_place()


def create(environ: MutableMapping[str, str] = os.environ) -> Path:
    """Make the run directory, for this user only (0700), unless it is there.

    Returns:
        its path.

    Raises:
        PermissionError: it belongs to someone else or is a symlink, so that another user could read or forge what is
            written there.
        OSError: it can't be made.
    """
    path = run_dir(environ)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_private(path)
    return path


def remove(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Remove the run directory, at the exit of its owner.

    Does nothing in any other process, nor for a directory that an operator named.

    Returns:
        True if it was removed.
    """
    path = run_dir(environ)
    match = _NAME.fullmatch(path.name)
    if match is None or match["process"] != process_name.own_name() or not path.is_dir():
        return False
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def purge_dead(base: Path | None = None) -> list[Path]:
    """Remove the run directories of servers that were killed before they could.

    Of servers of other machines and pid namespaces those go in which nothing was written for a day. Left alone are
    those of living processes, of other users, and anything with another name.

    Args:
        base: where run directories are; default is where this user's are.

    Returns:
        the removed ones.
    """
    base = _base(os.environ) if base is None else base
    removed = []
    try:
        entries = list(os.scandir(base))
    except OSError:
        return []
    for entry in entries:
        if _is_dead(entry):
            shutil.rmtree(entry.path, ignore_errors=True)
            if not os.path.lexists(entry.path):
                removed.append(Path(entry.path))
    return sorted(removed)


def _is_dead(entry: os.DirEntry[str]) -> bool:
    match = _NAME.fullmatch(entry.name)
    if match is None:
        return False
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:  # gone meanwhile
        return False
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    if match["place"] != process_name.own_place():
        return time.time() - found.st_mtime > _ABANDONED_S
    return process_name.is_dead(match["process"])


def _base(environ: Mapping[str, str]) -> Path:
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime if _is_own_runtime(runtime) else tempfile.gettempdir())


def _is_own_runtime(runtime: str) -> bool:
    """After su or sudo the variable may still name another user's directory, in which root may write, but he, too."""
    try:
        owner = os.stat(runtime).st_uid
    except (OSError, ValueError):
        return False
    usable = os.path.isabs(runtime) and os.path.isdir(runtime) and os.access(runtime, os.W_OK | os.X_OK)
    return usable and owner == os.geteuid()


def make_private(path: Path) -> None:
    """Make a directory for this user only, or make one of this user's so.

    Raises:
        PermissionError: it belongs to someone else, or is no directory.
        OSError: it can't be made.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise PermissionError(f"{path} must be a directory, not a symlink; remove it or set {RUN_DIR_ENV}")
    if found.st_uid != os.geteuid():
        raise PermissionError(
            f"{path} must belong to user {os.geteuid()}, but belongs to user {found.st_uid}; remove it or "
            f"set {RUN_DIR_ENV} to a directory of your own"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        path.chmod(0o700)
