"""The directory of trace files: what lies in it, read as cheaply as can be, and kept small.

Owns finding, caching and removing the files of `trace_record.py`. Workers write and remove, any process of the server
reads. A file that can't be read is skipped and counted, as snapshots are.
"""

import errno
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from glassbox.core.files import FileVersion
from glassbox.core.logs import get_logger, log_once
from glassbox.store.trace_ranks import merge_ranks
from glassbox.store.trace_record import RequestTrace, read_header, read_trace
from glassbox.store.trusted_file import list_files

logger = get_logger(__name__)

_Written = TypeVar("_Written")

_FOLDER: Final = "traces"
_PREFIX: Final = "trace-"
_SUFFIX: Final = ".npz"
# Of the disk, and of what its owner may have of it.
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_MB: Final = 1_000_000


def traces_path(run_dir: Path) -> Path:
    """Where the traces of a run directory lie."""
    return Path(run_dir) / _FOLDER


@dataclass(frozen=True)
class TraceSummary:
    """What is known of a traced request without reading its arrays; fields as in RequestTrace, over all workers.

    Attributes:
        num_rows: kept rows that every worker has, at least as far as their number tells.
    """

    request_id: str
    internal_id: str
    engine: str
    model_name: str
    requested_model: str
    adapter: str | None
    why: str
    status: str
    start_time_s: float
    end_time_s: float | None
    prompt_len: int
    num_generated: int
    num_rows: int
    truncated: bool


# Of one request: (engine, internal id).
TraceKey = tuple[str, str]


class TraceDirectory:
    """Reads the traces of a run directory; a file's header is parsed again only when it was replaced.

    Arrays are not kept: each call that returns a RequestTrace reads them.

    Attributes:
        path: of the directory, which need not exist.
        unreadable: how many file versions could not be read so far.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = traces_path(run_dir)
        self._cache: dict[str, tuple[FileVersion, dict[str, Any] | None]] = {}
        self._seen: dict[str, FileVersion] = {}
        self.unreadable = 0

    def versions(self) -> dict[str, FileVersion]:
        """Name and version of every trace file; empty if there is no directory."""
        return list_files(self.path, _PREFIX, _SUFFIX)

    def summaries(self) -> list[TraceSummary]:
        """All traced requests, newest first."""
        return [_summarise(headers) for headers in self._requests(self.versions()).values()]

    def unfinished(self) -> list[str]:
        """Names of the files of requests that run, and of those that can't be read."""
        self._requests(self.versions())
        return [name for name, (_, header) in self._cache.items() if header is None or header["status"] == "active"]

    def read(self) -> list[RequestTrace]:
        """All traces, merged over workers, newest first. Reads every file: `summaries` is cheaper."""
        return self._load(self._requests(self.versions()))

    def changed(self) -> list[RequestTrace]:
        """Traces of which a file was written since the last call (at first: all), newest first."""
        versions = self.versions()
        changed = {name for name, version in versions.items() if self._seen.get(name) != version}
        self._seen = versions
        requests = self._requests(versions)
        return self._load({key: files for key, files in requests.items() if changed & files.keys()})

    def get(self, request_id: str) -> RequestTrace | None:
        """The trace of an internal id, or the newest of an external one; None if there is none.

        Completions have external ids of the form `cmpl-...-0`, one per prompt, and their clients know `cmpl-...`: that
        finds the first prompt's. `find` returns those of all prompts and samples.
        """
        found = self.find(request_id)
        return found[0] if found else None

    def find(self, request_id: str) -> list[RequestTrace]:
        """All traces that `request_id` may mean: those of an internal id, else of an external one, else of a
        completion's prompts; in the order of their internal ids within a request, newest request first."""
        requests = self._requests(self.versions())

        def chosen(fits: Any) -> dict[TraceKey, dict[str, dict[str, Any]]]:
            return {key: files for key, files in requests.items() if fits(next(iter(files.values())))}

        found = chosen(lambda header: header["internal_id"] == request_id)
        found = found or chosen(lambda header: header["request_id"] == request_id)
        found = found or chosen(lambda header: _is_prompt_of(header["request_id"], request_id))
        return sorted(self._load(found), key=lambda trace: (trace.request_id, trace.internal_id))

    def _requests(self, versions: Mapping[str, FileVersion]) -> dict[TraceKey, dict[str, dict[str, Any]]]:
        """Headers by file, by request, newest request first."""
        self._cache = {name: entry for name, entry in self._cache.items() if name in versions}
        for name, version in versions.items():
            if name not in self._cache or self._cache[name][0] != version:
                self._cache[name] = (version, self._try(read_header, name))
        requests: dict[TraceKey, dict[str, dict[str, Any]]] = {}
        for name, (_, header) in sorted(self._cache.items()):
            if header is not None:
                requests.setdefault((header["engine"], header["internal_id"]), {})[name] = header
        newest_first = sorted(requests, key=lambda key: (-_start(requests[key]), key))
        return {key: requests[key] for key in newest_first}

    def _load(self, requests: Mapping[TraceKey, Mapping[str, Any]]) -> list[RequestTrace]:
        loaded = []
        for files in requests.values():
            parts = [part for part in (self._try(read_trace, name) for name in files) if part is not None]
            if parts:
                loaded.append(merge_ranks(parts))
        return loaded

    def _try(self, read: Any, name: str) -> Any:
        try:
            return read(self.path / name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.unreadable += 1
            log = logger.warning if self.unreadable == 1 else logger.debug
            log("glassbox skips an unreadable trace file: %s", error)
            return None


def _is_prompt_of(external: str, request_id: str) -> bool:
    base, dash, index = external.rpartition("-")
    return bool(dash) and base == request_id and index.isdigit()


def _start(headers: Mapping[str, Mapping[str, Any]]) -> float:
    return min(float(header["start_time_s"]) for header in headers.values())


def _summarise(headers: Mapping[str, Mapping[str, Any]]) -> TraceSummary:
    parts = list(headers.values())
    first = parts[0]
    active = any(part["status"] == "active" for part in parts)
    ends = [part["end_time_s"] for part in parts if part["end_time_s"] is not None]
    return TraceSummary(
        request_id=first["request_id"],
        internal_id=first["internal_id"],
        engine=first["engine"],
        model_name=first["model_name"],
        requested_model=first["requested_model"],
        adapter=first["adapter"],
        why=first["why"],
        status="active" if active else first["status"],
        start_time_s=_start(headers),
        end_time_s=None if active else max(ends, default=None),
        prompt_len=first["prompt_len"],
        num_generated=max(part["num_generated"] for part in parts),
        num_rows=min(part["num_rows"] for part in parts),
        truncated=any(part["truncated"] for part in parts),
    )


class TraceFiles:
    """The files that a worker writes, and those of its predecessors after a restart, kept within limits.

    Lists the directory once, since workers have better things to do, and knows from then on what it holds.

    Attributes:
        dropped: files that were removed, of any worker, because the file system was full.

    Args:
        directory: of the files.
        prefix: of these files.
    """

    def __init__(self, directory: Path, prefix: str) -> None:
        self._directory, self._prefix = Path(directory), prefix
        self.dropped = 0
        # Bytes by name, the latest last; None is not listed yet.
        self._sizes: dict[str, int] | None = None

    def wrote(self, name: str, size: int) -> None:
        """A file is there, or is there anew, with so many bytes."""
        sizes = self._listed()
        sizes.pop(name, None)
        sizes[name] = size

    def prune(self, *, keep: int, keep_mb: int, active: Collection[str] = ()) -> list[Path]:
        """Remove the oldest files until what remains is within the limits.

        Args:
            keep: most files; keep_mb: most MB of them together.
            active: names that are kept whatever the limits: requests that still run.

        Returns:
            The removed ones, oldest first.

        Raises:
            OSError: the directory can't be listed, or a file not removed.
        """
        sizes = self._listed()
        if len(sizes) <= keep and sum(sizes.values()) <= keep_mb * _MB:
            return []
        removed, kept, total = [], 0, 0
        for name in reversed(list(sizes)):
            if name in active or (kept < keep and total + sizes[name] <= keep_mb * _MB):
                kept, total = kept + 1, total + sizes[name]
            else:
                kept = keep  # what is older than a removed one goes, too
                path = self._directory / name
                path.unlink(missing_ok=True)
                del sizes[name]
                removed.append(path)
        return removed[::-1]

    def with_room(self, write: Callable[[], _Written], needed: int = 1) -> _Written:
        """Write something; while the file system is full, the oldest traces go, one, two, four, ... of them.

        Args:
            write: does it; called again after each removal.
            needed: bytes, as far as they are known: for more than all traces have none is removed.

        Raises:
            OSError: it can't be written, not even without any trace.
        """
        count = 1
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in _NO_ROOM or not self._drop_oldest(count, needed):
                    raise
            count *= 2

    def _drop_oldest(self, count: int, needed: int) -> bool:
        """False if there is nothing to remove, or not enough."""
        files = list_files(self._directory, _PREFIX, _SUFFIX)
        if not files or sum(size for _, _, size in files.values()) < needed:
            return False
        oldest = sorted(files, key=lambda name: files[name][1])[:count]
        for name in oldest:
            (self._directory / name).unlink(missing_ok=True)
            self._listed().pop(name, None)
        self.dropped += len(oldest)
        log_once(
            logger,
            logging.WARNING,
            "full",
            "The file system of %s is full: the oldest traces are removed, so that metrics go on (counted in "
            "glassbox_traces_dropped_total). Make room there, or lower requests.keep_mb",
            self._directory,
        )
        return True

    def _listed(self) -> dict[str, int]:
        if self._sizes is None:
            files = list_files(self._directory, self._prefix, _SUFFIX)
            found = sorted((time_ns, name, size) for name, (_, time_ns, size) in files.items())
            self._sizes = {name: size for _, name, size in found}
        return self._sizes
