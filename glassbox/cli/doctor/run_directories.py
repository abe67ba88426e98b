"""What this user's running servers leave in their run directories: how old it is, and whether anybody shows it."""

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from glassbox.cli.doctor.error_stages import stage_findings
from glassbox.cli.doctor.finding import Finding, error, ok, unknown, warning
from glassbox.cli.doctor.local_servers import LocalServer, own_port
from glassbox.cli.doctor.question import Question
from glassbox.core.kill_switch import is_disabled
from glassbox.store import api_server_note
from glassbox.store.exporter_lock import LOCK_NAME, ExporterLock
from glassbox.store.exporter_status import read_status
from glassbox.store.rundir import RUN_DIR_ENV
from glassbox.store.snapshot import SnapshotReader
from glassbox.view.text import format_seconds

# An idle engine writes its snapshot every so often as well; a worker that hangs does not.
_INTERVALS: Final = 6
_LEAST_S: Final = 30.0
# prometheus_client's; vLLM chooses one of its own unless an operator names one.
_MULTIPROCESS_ENV: Final = "PROMETHEUS_MULTIPROC_DIR"
PORT_OR_PUSH: Final = "set export.http.port (a port of glassbox's own), or push with export.otel.enabled"


def servers(question: Question) -> Iterator[Finding]:
    """This user's running servers, and their run directories."""
    if not Path("/proc/self/stat").exists():
        yield unknown("run.servers", "this system has no /proc, by which servers are found", "name one: --run-dir")
        return
    if not question.examined:
        which = "vLLM server" if question.url is None else f"server at {question.url}"
        remedy = "run doctor on its host, or in its container, as its user"
        yield unknown("run.servers", f"user {os.geteuid()} runs no {which} in sight of this process", remedy)
    for server in question.examined:
        seen = f"vllm serve, process {server.pid}, port {server.port}"
        if is_disabled(server.environ):
            yield ok("run.servers", f"{seen}, with GLASSBOX_DISABLE")
        elif server.run_dir is None and question.run_dir is None:
            # What names it is set by the plugin, and inherited by the processes that the server starts.
            yield warning(
                "run.servers",
                f"{seen}: none of its processes knows of a run directory",
                "is it still starting? Else glassbox is not loaded there: see plugin.installed and the server's log",
            )
        else:
            yield ok("run.servers", f"{seen}, run directory {server.run_dir or question.run_dir}")
        if server.front_end is not None:
            yield from _hidden(server, question)


def _hidden(server: LocalServer, question: Question) -> Iterator[Finding]:
    """A front end that doesn't show what Python's processes measure needs another way out."""
    config = question.valid_config if server == question.server else None
    seen = f"process {server.pid} is behind {server.front_end}, which shows nothing of glassbox at its /metrics"
    if config is None:
        yield warning("run.front_end", seen, PORT_OR_PUSH)
    elif own_port(config) is None and not config.export.otel.enabled:
        yield error("run.front_end", f"{seen}: measured, but nobody can see it", PORT_OR_PUSH)
    else:
        yield ok("run.front_end", f"{seen}; glassbox's own port or OTLP does")


def shared(question: Question) -> Iterator[Finding]:
    """No two servers in one run directory, nor in one directory of prometheus_client's files."""
    places: dict[str, list[tuple[LocalServer, object]]] = {
        RUN_DIR_ENV: [(server, server.run_dir) for server in question.servers],
        _MULTIPROCESS_ENV: [(server, server.environ.get(_MULTIPROCESS_ENV)) for server in question.servers],
    }
    for variable, named in places.items():
        for place in sorted({str(place) for _, place in named if place}):
            pids = [str(server.pid) for server, theirs in named if theirs and str(theirs) == place]
            if len(pids) > 1:
                seen = f"the servers {' and '.join(pids)} share {place}: each shows the other's numbers"
                yield error("run.shared", seen, f"give each server a {variable} of its own, or leave it to choose one")


def directories(question: Question) -> Iterator[Finding]:
    """Each run directory's workers, exporter and errors."""
    named = [] if question.run_dir is None else [question.run_dir]
    found = named or [server.run_dir for server in question.examined if server.run_dir is not None]
    if not found:
        yield unknown("run.snapshots", "there is no run directory to look at", "glassbox doctor --run-dir DIRECTORY")
    for folder in dict.fromkeys(found):
        yield from _directory(folder, question)


def _directory(folder: Path, question: Question) -> Iterator[Finding]:
    name = "run.snapshots"
    try:
        entry = folder.lstat()
    except OSError as problem:
        yield error(name, f"{folder}: {problem.strerror}", "its server has not begun or has ended; restart the server")
        return
    if not stat.S_ISDIR(entry.st_mode) or entry.st_uid != os.geteuid() or stat.S_IMODE(entry.st_mode) & 0o022:
        seen = f"{folder} must be a directory of user {os.geteuid()} that nobody else may write to"
        yield error("run.trust", seen, "remove it, or set GLASSBOX_RUN_DIR to a folder of your own; then restart")
        return
    odd = [item.name for item in os.scandir(folder) if not _is_plain(item)]
    if odd:  # a named pipe would be waited for
        seen = f"{folder} holds what is no file of this user: {', '.join(sorted(odd)[:5])}"
        yield error("run.trust", seen, "remove it, and ask who put it there")
        return
    yield ok("run.trust", f"{folder} belongs to this user alone")
    config = question.valid_config
    interval_s = 5.0 if config is None else config.export.interval_s
    limit_s = max(_LEAST_S, _INTERVALS * interval_s)
    reader = SnapshotReader(folder)
    snapshots = reader.read()
    if reader.unreadable:
        seen = f"{reader.unreadable} snapshot files in {folder} can't be read"
        yield error("run.readable", seen, "run one version of glassbox in all processes of a server; remove the files")
    if not snapshots:
        seen = f"no worker has left a snapshot in {folder}"
        yield warning(name, seen, "is the server still starting? Else its log says why nothing is observed")
        return
    ages = [time.time() - snapshot.time_s for snapshot in snapshots]
    youngest, oldest = min(ages), max(ages)
    seen = f"{len(snapshots)} workers, the newest snapshot is {format_seconds(max(0.0, youngest))} old"
    full = "is the disk full (df), does the worker still run? docs/runbooks/GlassboxNotSampling.md"
    if youngest > limit_s:
        yield error(name, f"{seen}: nothing new for more than {format_seconds(limit_s)}", full)
    elif oldest > limit_s:
        stale = sum(age > limit_s for age in ages)
        yield warning(name, f"{seen}; {stale} of them wrote nothing for more than {format_seconds(limit_s)}", full)
    else:
        yield ok(name, seen)
    steps, sampled = (sum(getattr(one, what) for one in snapshots) for what in ("steps", "sampled_steps"))
    yield ok("run.steps", f"{steps} steps seen, {sampled} measured, by the workers of {folder}")
    yield from _shown(folder, limit_s)


def _shown(folder: Path, limit_s: float) -> Iterator[Finding]:
    """Somebody shows what is measured: an API server of this node, or an exporter."""
    status = read_status(folder)
    held = (folder / LOCK_NAME).exists() and ExporterLock.is_held(folder)
    if status is None and not held:
        if api_server_note.is_noted(folder):
            yield ok("run.exporter", "none, and none is needed: the API server shows the metrics")
        else:
            yield error(
                "run.exporter",
                f"{folder}: measured, but nobody can see it: no API server of this node reads it, and there is no "
                "exporter (workers of Ray, a headless node, another front end)",
                f"{PORT_OR_PUSH}, in a file that GLASSBOX_CONFIG names on this node, too",
            )
        return
    restarts = "its worker starts it again; the server's log says why it ended"
    if not held:
        yield error("run.exporter", f"{folder}: the exporter has ended", restarts)
    elif status is None:
        yield warning("run.exporter", f"{folder}: the exporter has not done a round yet", "look again in a few seconds")
    elif (age := time.time() - status.time_s) > limit_s:
        seen = f"the exporter {status.pid} hangs: its last round was {format_seconds(age)} ago"
        yield error("run.exporter", seen, f"end it (kill {status.pid}); {restarts}")
    else:
        yield ok("run.exporter", f"process {status.pid}, last round {format_seconds(max(0.0, age))} ago")
    if status is not None:
        yield from stage_findings("run.errors", status.errors)


def _is_plain(entry: os.DirEntry[str]) -> bool:
    """A file or folder of this user; no link, pipe or device."""
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:  # gone meanwhile
        return True
    return (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)) and found.st_uid == os.geteuid()
