"""The run directory: where the processes of one server leave their snapshots for each other.

Owns its name, making and removal; what lies in it belongs to the other modules of this room. The first process of a
server names it in GLASSBOX_RUN_DIR, its children inherit the variable. Needs /proc (Linux), as vLLM's servers do.

    $XDG_RUNTIME_DIR (or the temporary directory) / glassbox-<uid> / <pid>-<start time>-<pid namespace>-<machine>

pid and start time (clock ticks since boot) name the owner: together they can't be taken for another process
once the pid is used again. The pid namespace is there because containers may share a /tmp, and only within
one namespace does "no such process" mean that the owner is dead. The machine is there because Ray takes the variable
to other nodes, where all workers of the server share a directory of that name, each node its own.
"""

import functools
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final

RUN_DIR_ENV: Final = "GLASSBOX_RUN_DIR"
_NAME: Final = re.compile(r"(?P<pid>\d+)-(?P<start>\d+)-(?P<place>\d+-[0-9a-f]{8})")
# Of a directory whose owner can't be looked for: a living worker writes into it at least once an hour.
_ABANDONED_S: Final = 24 * 3600.0


def run_dir(environ: MutableMapping[str, str] = os.environ) -> Path:
    """Path of this server's run directory, which need not exist yet.

    The first call, in the server's first process, chooses it and sets GLASSBOX_RUN_DIR for the processes to
    come. If these run elsewhere (`is_elsewhere`), it is one of the same name where theirs are: the path may be
    nobody's there, or somebody else's.
    """
    if not environ.get(RUN_DIR_ENV):
        environ[RUN_DIR_ENV] = str(_parent(environ) / _own_name())
    path = Path(environ[RUN_DIR_ENV]).absolute()
    return _parent(environ) / path.name if is_elsewhere(environ) else path


def is_elsewhere(environ: Mapping[str, str] = os.environ) -> bool:
    """True if the server's first process is on another machine, or in another container, as Ray's workers may find.

    False if there is none yet, and for a directory that an operator named.
    """
    match = _NAME.fullmatch(Path(environ.get(RUN_DIR_ENV, "")).name)
    return match is not None and match["place"] != _place()


def create(environ: MutableMapping[str, str] = os.environ) -> Path:
    """Make the run directory, for this user only (0700), unless it is there.

    Returns:
        its path.

    Raises:
        PermissionError: it, or the directory of glassbox's run directories, belongs to someone else or is a
            symlink, so that another user could read or forge what is written there.
        OSError: it can't be made.
    """
    path = run_dir(environ)
    if path.parent == _parent(environ):
        _make_private(path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    _make_private(path)
    return path


def remove(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Remove the run directory, at the exit of its owner.

    Does nothing in any other process, nor for a directory that an operator named.

    Returns:
        True if it was removed.
    """
    path = run_dir(environ)
    if path.name != _own_name() or path.parent != _parent(environ) or not path.is_dir():
        return False
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def purge_dead(parent: Path | None = None) -> list[Path]:
    """Remove the run directories of servers that were killed before they could.

    Of servers of other machines and pid namespaces those go in which nothing was written for a day. Left alone are
    those of living processes, of other users, and anything with another name.

    Args:
        parent: the directory of run directories; default is that of this user.

    Returns:
        the removed ones.
    """
    parent = _parent(os.environ) if parent is None else parent
    removed = []
    try:
        entries = list(os.scandir(parent))
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
    if match["place"] != _place():
        return time.time() - found.st_mtime > _ABANDONED_S
    return _start_time(int(match["pid"])) != int(match["start"])


def _parent(environ: Mapping[str, str]) -> Path:
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    # After su or sudo the variable may still name another user's directory.
    usable = os.path.isabs(runtime) and os.path.isdir(runtime) and os.access(runtime, os.W_OK | os.X_OK)
    return Path(runtime if usable else tempfile.gettempdir()) / f"glassbox-{os.geteuid()}"


def _make_private(path: Path) -> None:
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


def _own_name() -> str:
    pid = os.getpid()
    return f"{pid}-{_start_time(pid)}-{_place()}"


def _place() -> str:
    """Where process ids mean something: pid namespace and machine."""
    return f"{Path('/proc/self/ns/pid').stat().st_ino}-{_machine()}"


@functools.cache
def _machine() -> str:
    """Of the running kernel: the pid namespace of a machine's first process has the same number on every machine."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    except OSError:  # some sandboxes lack it
        text = uuid.uuid5(uuid.NAMESPACE_DNS, os.uname().nodename).hex
    return text.replace("-", "").strip()[:8]


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of process `pid`; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Field 22; the second, the command, is in parentheses and may itself hold blanks and parentheses.
    return int(text.rpartition(")")[2].split()[19])
