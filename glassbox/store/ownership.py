"""Which server a run directory is whose name an operator chose (GLASSBOX_RUN_DIR): one at a time.

Owns the file in it that says so. All processes of a server hold a lock on that file, so another server finds it taken
as long as one of them lives, however they end. The server's first process is the one that inherits no
GLASSBOX_RUN_OWNER for this directory; it names the server there, and its children know by it that they belong to it.
What a dead server has left in the directory is removed before the next one begins: it would be shown as if it were
measured now.

A server that can't have the directory gets one of its own and says so: two servers' numbers are never mixed.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Final

from glassbox.core.logs import get_logger
from glassbox.store import (
    api_server_note,
    exporter_status,
    llm_spans,
    metrics_page,
    orders,
    process_name,
    rundir,
    score_files,
    score_totals,
    tokenizer_note,
    trace_refusals,
)
from glassbox.store.trace_directory import TraceDirectory
from glassbox.store.trusted_file import list_files, open_lock

logger = get_logger(__name__)

OWNER_ENV: Final = "GLASSBOX_RUN_OWNER"
OWNER_NAME: Final = "owner"
# That a worker has said that nobody reads what it writes; see processes/worker/unread.py.
UNREAD_NAME: Final = "unread"
# Processes of a killed server end a little later than its first one.
_DYING_S: Final = 10.0
_PAUSE_S: Final = 0.05
# Two processes of one server may come at once; one of them holds the lock alone for an instant.
_ATTEMPTS: Final = 20
_NAME_BYTES: Final = 256


class TakenError(OSError):
    """The directory is another server's."""


def settle(environ: MutableMapping[str, str] = os.environ) -> Callable[[], None]:
    """Make sure that the run directory is this server's alone, and keep it so as long as this process lives.

    If an operator named one that is another server's, or can't be used, GLASSBOX_RUN_DIR is changed for this process
    and its children, and an error is logged.

    Returns:
        The undo, which restores the variables and lets go of the directory.
    """
    if not rundir.is_named(environ):
        rundir.run_dir(environ)
        return lambda: None
    before = {name: environ.get(name) for name in (rundir.RUN_DIR_ENV, OWNER_ENV)}
    path = rundir.run_dir(environ)
    environ[rundir.RUN_DIR_ENV] = str(path)  # absolute: Ray's workers have another working directory
    server, _, owned = environ.get(OWNER_ENV, "").partition("@")
    if owned != str(path):
        server = rundir.new_server()
        environ[OWNER_ENV] = f"{server}@{path}"
    lock: int | None = None
    try:
        lock = _take(path, server)
    except OSError as error:
        own = rundir.path_of(server, environ)
        environ[rundir.RUN_DIR_ENV] = str(own)
        logger.error(
            "%s %s can't be this server's: %s. Its files are in %s instead, and nothing is mixed. Give each server a "
            "directory of its own, or leave %s unset",
            rundir.RUN_DIR_ENV,
            path,
            error,
            own,
            rundir.RUN_DIR_ENV,
        )

    def undo() -> None:
        if lock is not None:
            os.close(lock)
        for name, value in before.items():
            environ.pop(name, None)
            if value is not None:
                environ[name] = value

    return undo


def _take(path: Path, server: str) -> int:
    """Lock the directory for a server; returns the descriptor that holds the lock.

    Raises:
        TakenError: it is another one's.
        OSError: it can't be made, is another user's, or can't be locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.make_private(path)
    deadline = time.monotonic() + _DYING_S
    while True:
        handle = open_lock(path / OWNER_NAME, create=True)
        try:
            owner = _lock(handle, path, server)
        except BaseException:
            os.close(handle)
            raise
        if owner == server:
            return handle
        os.close(handle)
        if not process_name.is_dead(owner) or time.monotonic() > deadline:
            raise TakenError(f"another server uses it (process {process_name.pid_of(owner)})")
        time.sleep(_PAUSE_S)


def _lock(handle: int, path: Path, server: str) -> str:
    """Lock the file of the directory's owner if that is `server` or nobody; returns the owner's name."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else has it
            if _read(handle) != server:
                _clear(path)
                os.ftruncate(handle, 0)
                os.pwrite(handle, server.encode(), 0)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return _read(handle)
        time.sleep(_PAUSE_S)
    raise TakenError("another server is just taking it")


def _read(handle: int) -> str:
    return os.pread(handle, _NAME_BYTES, 0).decode(errors="replace")


def _clear(path: Path) -> None:
    """Remove what a server that has ended has left, but for the traces of requests that had ended, too.

    Other files of the directory are the operator's.
    """
    for leftover in _leftovers(path):
        leftover.unlink(missing_ok=True)


def _leftovers(path: Path) -> Iterator[Path]:
    names = (exporter_status.STATUS_NAME, score_totals.TOTALS_NAME, api_server_note.NAME, tokenizer_note.NAME)
    yield from (path / name for name in (*names, UNREAD_NAME, score_files.AWAITED_NAME, *metrics_page.NAMES))
    yield from (path / name for name in list_files(path, "worker-", ".npz"))
    yield from (path / name for name in list_files(path, trace_refusals.PREFIX, trace_refusals.SUFFIX))
    spans = path / llm_spans.FOLDER
    yield from (spans / name for name in list_files(spans, "", ".json"))
    yield from (path / orders.FOLDER / name for name in list_files(path / orders.FOLDER, "", ""))
    traces = TraceDirectory(path)
    yield from (traces.path / name for name in traces.unfinished())
    for folder in (path, spans, traces.path, path / score_files.FOLDER):
        yield from (folder / name for name in list_files(folder, ".", ".tmp"))
