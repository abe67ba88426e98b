"""The directory of trace files: what lies in it, read as cheaply as can be, and kept small.

Owns finding, caching and removing the files of `trace_record.py`. Workers write and remove, any process of the server
reads. A file that can't be read is skipped and counted, as snapshots are.
"""

import errno
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from glassbox.core.files import FileVersion
from glassbox.core.logs import get_logger, log_once
from glassbox.store.awaited_ranks import AwaitedRanks, RanksNow
from glassbox.store.file_cache import FileCache
from glassbox.store.logprobs_files import read_logprobs
from glassbox.store.trace_ranks import merge_ranks
from glassbox.store.trace_record import (
    UNKNOWN,
    RequestTrace,
    call_and_sample,
    client_of_name,
    is_of_client,
    may_be_of,
    read_header,
    read_trace,
    trace_suffix,
)
from glassbox.store.trusted_file import list_files

logger = get_logger(__name__)

_Written = TypeVar("_Written")

_FOLDER: Final = "traces"
_PREFIX: Final = "trace-"
_SUFFIX: Final = ".npz"
# Of the disk, and of what its owner may have of it.
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_MB: Final = 1_000_000
# Files of one id that are looked at: whoever sends the same id again and again makes nobody read more.
MAX_OF_AN_ID: Final = 256


def traces_path(run_dir: Path) -> Path:
    """Where the traces of a run directory lie."""
    return Path(run_dir) / _FOLDER


@dataclass(frozen=True)
class TraceSummary:
    """What is known of a traced request without reading its arrays; fields as in RequestTrace, over all workers.

    Attributes:
        status: `active` as long as one of the workers traces it, or is still to write its part.
        end_time_s: None as long as it is active.
        num_rows: kept rows that every worker has, at least as far as their number tells.
        signals: that the request asked for.
        chosen_layers: likewise; None is all.
        instances: of the workers that have written it.
        runs: one of these traces it still.
        awaited_ranks: how many more workers have nothing written of it yet, and may do so.
    """

    request_id: str
    internal_id: str
    engine: str
    model_name: str
    requested_model: str
    adapter: str | None
    client: str | None
    why: str
    status: str
    start_time_s: float
    end_time_s: float | None
    prompt_len: int
    num_generated: int
    num_rows: int
    truncated: bool
    signals: tuple[str, ...]
    chosen_layers: tuple[int, ...] | None
    instances: frozenset[str]
    runs: bool
    awaited_ranks: int

    @property
    def key(self) -> "TraceKey":
        """What tells it from all others."""
        return self.engine, self.internal_id, self.client


# Of one request: (engine, internal id, client). vLLM can be told not to make its ids unique.
TraceKey = tuple[str, str, str | None]


class TraceDirectory:
    """Reads the traces of a run directory; a file's header is parsed again only when it was replaced.

    Arrays are not kept: each call that returns a RequestTrace reads them. A request is `active` until all living
    ranks have written its end, or have been waited for in vain (`awaited_ranks.py`).

    Attributes:
        path: of the directory, which need not exist.
        unreadable: how many file versions could not be read so far.

    Args:
        run_dir: of the server.
        clock: Unix time in seconds.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = traces_path(run_dir)
        self._awaited = AwaitedRanks(run_dir, clock)
        self._headers = FileCache(lambda name: self._try(read_header, name))
        self.unreadable = 0

    def versions(self) -> dict[str, FileVersion]:
        """Name and version of every trace file; empty if there is no directory."""
        return list_files(self.path, _PREFIX, _SUFFIX)

    def summaries(self, client: str | None = None, *, last: bool = False) -> list[TraceSummary]:
        """All traced requests, or those of a client, newest first.

        Args:
            last: nobody is waited for, as nothing will come later.

        Raises:
            OSError: the run directory can't be read.
        """
        versions = self.versions()
        names = versions if client is None else [name for name in versions if is_of_client(name, client)]
        return self._summarise(self._requests(versions, names), None if last else self._awaited.now())

    def unfinished(self) -> list[str]:
        """Names of the files of requests that run, and of those that can't be read."""
        versions = self.versions()
        self._requests(versions, versions)
        return [name for name, _, header in self._headers.items() if header is None or header["status"] == "active"]

    def read(self) -> list[RequestTrace]:
        """All traces, merged over workers, newest first. Reads every file: `summaries` is cheaper."""
        versions = self.versions()
        return self._load(self._requests(versions, versions), self._awaited.now())

    def get(self, request_id: str) -> RequestTrace | None:
        """The trace of an internal id, or the newest of an external one; None if there is none."""
        found = self.find(request_id)
        return self.load(found[0]) if found else None

    def suffixes(self) -> frozenset[str]:
        """How the names of all files end; see `trace_suffix`."""
        return frozenset(name[name.rindex("-") :] for name in self.versions())

    def headers(self, internal_id: str, client: str | None) -> dict[str, dict[str, Any]]:
        """Headers of the traces of a client's request, one of each worker that has one, by file.

        No other file is looked at: it costs little to ask again and again.
        """
        names = list_files(self.path, _PREFIX, trace_suffix(client, internal_id))
        headers = {name: self._try(read_header, name) for name in sorted(names)}
        return {
            name: header
            for name, header in headers.items()
            if header is not None and (header["internal_id"], header["client"]) == (internal_id, client)
        }

    def merged(self, names: Iterable[str]) -> RequestTrace | None:
        """The trace in files of one request, whoever else has a part of it; None if they were removed meanwhile."""
        found = self._load({("", "", None): dict.fromkeys(names)}, None)
        return found[0] if found else None

    def traces(self, request_id: str) -> list[RequestTrace]:
        """Those of `find` with their arrays."""
        loaded = (self.load(found) for found in self.find(request_id))
        return [trace for trace in loaded if trace is not None]

    def load(self, summary: TraceSummary) -> RequestTrace | None:
        """A trace with its arrays; None if it was removed meanwhile. It has ended if the summary says so."""
        versions = self.versions()
        names = [name for name in versions if may_be_of(name, summary.internal_id)]
        files = self._requests(versions, names).get(summary.key)
        ranks = self._awaited.now() if summary.status == "active" else None
        found = self._load({summary.key: files}, ranks) if files else []
        return found[0] if found else None

    def find(self, request_id: str, client: str | None = None) -> list[TraceSummary]:
        """All traces that `request_id` may mean: that of an internal id, else those of an external one, else of a
        completion's prompts.

        Completions have external ids of the form `cmpl-...-0`, one per prompt, and their clients know `cmpl-...`. A
        client may send an id again: its newest request comes first, of this the first prompt's first sample. Only
        headers are read, of the newest `MAX_OF_AN_ID` files that by their names may be meant.

        Args:
            client: only this one's are found; None: all are.
        """
        versions = self.versions()
        names = [
            name for name in versions if may_be_of(name, request_id) and (client is None or is_of_client(name, client))
        ]
        if len(names) > MAX_OF_AN_ID:
            names = sorted(names, key=lambda name: versions[name][1], reverse=True)[:MAX_OF_AN_ID]
        requests = self._summarise(self._requests(versions, names), self._awaited.now())
        # As the files say it, whatever their names do.
        requests = [one for one in requests if client is None or one.client == client]
        found = [one for one in requests if one.internal_id == request_id]
        found = found or [one for one in requests if one.request_id == request_id]
        found = found or [one for one in requests if _is_prompt_of(one.request_id, request_id)]
        return _newest_first(found)

    def _requests(
        self, versions: Mapping[str, FileVersion], names: Iterable[str]
    ) -> dict[TraceKey, dict[str, dict[str, Any]]]:
        """Headers of the files of these names, by file, by request, newest request first.

        Args:
            versions: of all files; what is known of others is forgotten.
        """
        self._headers.keep(versions)
        requests: dict[TraceKey, dict[str, dict[str, Any]]] = {}
        for name in sorted(names):
            if (header := self._headers.of(name, versions[name])) is not None:
                key = header["engine"], header["internal_id"], header["client"]
                requests.setdefault(key, {})[name] = header
        newest_first = sorted(requests, key=lambda key: (-_start(requests[key]), key[:2], key[2] or ""))
        return {key: requests[key] for key in newest_first}

    def _summarise(
        self, requests: Mapping[TraceKey, Mapping[str, Mapping[str, Any]]], ranks: RanksNow | None
    ) -> list[TraceSummary]:
        """Of requests by the headers of their files; None as `ranks`: nobody is waited for."""
        found = [_summary(headers) for headers in requests.values()]
        if ranks is None:
            return found
        awaited = [ranks.awaited(one.engine, _end(one), one.chosen_layers, one.instances) for one in found]
        return [
            replace(one, status="active", end_time_s=None, awaited_ranks=number) if number else one
            for one, number in zip(found, awaited, strict=True)
        ]

    def _load(self, requests: Mapping[TraceKey, Mapping[str, Any]], ranks: RanksNow | None) -> list[RequestTrace]:
        loaded = []
        for files in requests.values():
            parts = [part for part in (self._try(read_trace, name) for name in files) if part is not None]
            if parts:
                trace = merge_ranks(parts)
                there = {part.instance for part in parts}
                if ranks is not None and ranks.awaited(trace.engine, _end(trace), trace.options.layers, there):
                    trace = replace(trace, status="active", end_time_s=None)
                loaded.append(self._with_logprobs(trace))
        return loaded

    def _with_logprobs(self, trace: RequestTrace) -> RequestTrace:
        """The trace with the log-probabilities that lie beside it, if its signals need them."""
        if "logprobs" not in trace.options.arrays:
            return trace
        try:
            found = read_logprobs(self.path, trace.internal_id, trace.client, trace.num_generated)
        except OSError as error:
            log_once(logger, logging.WARNING, "logprobs", "glassbox skips log-probabilities of a trace: %s", error)
            return trace
        return replace(trace, arrays={**trace.arrays, "logprobs": found})

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


def _newest_first(found: list[TraceSummary]) -> list[TraceSummary]:
    """The newest request of an id first; prompts and samples of one request in their order."""
    started: dict[str, dict[str, float]] = {}
    for one in found:
        calls = started.setdefault(one.request_id, {})
        call, _ = call_and_sample(one.internal_id)
        calls[call] = min(one.start_time_s, calls.get(call, one.start_time_s))
    # How many requests of this very id are newer.
    newer = {
        call: number
        for calls in started.values()
        for number, call in enumerate(sorted(calls, key=lambda call: (-calls[call], call)))
    }

    def place(one: TraceSummary) -> tuple[int, int, str, int, str]:
        call, sample = call_and_sample(one.internal_id)
        return newer[call], prompt_number(one.request_id), one.request_id, sample, one.client or ""

    return sorted(found, key=place)


def prompt_number(external: str) -> int:
    """Of the prompt of a completion, by its external id; other requests have one, whose number means nothing."""
    number = external.rpartition("-")[2]
    return int(number) if number.isdecimal() and len(number) < 9 else 0


def _is_prompt_of(external: str, request_id: str) -> bool:
    base, dash, index = external.rpartition("-")
    return bool(dash) and base == request_id and index.isdigit()


def _start(headers: Mapping[str, Mapping[str, Any]]) -> float:
    return min(float(header["start_time_s"]) for header in headers.values())


def _end(found: TraceSummary | RequestTrace) -> float | None:
    """When it has ended, by the parts that are there; None if it runs."""
    return None if found.status == "active" else found.end_time_s or 0.0


def _summary(headers: Mapping[str, Mapping[str, Any]]) -> TraceSummary:
    """By the parts that are there."""
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
        client=first["client"],
        why=first["why"],
        status="active" if active else first["status"],
        start_time_s=_start(headers),
        end_time_s=None if active else max(ends, default=None),
        prompt_len=first["prompt_len"],
        num_generated=max(part["num_generated"] for part in parts),
        num_rows=min(part["num_rows"] for part in parts),
        truncated=any(part["truncated"] for part in parts),
        signals=first["options"].signals,
        chosen_layers=first["options"].layers,
        instances=frozenset(part["instance"] for part in parts),
        runs=active,
        awaited_ranks=0,
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

    def prune(self, *, keep: int, keep_mb: int, per_client: int, active: Collection[str] = ()) -> list[Path]:
        """Remove files until what remains is within the limits: each time the oldest of the client that has most.

        So a client that has many traces made loses its own first, before anybody who has fewer.

        Args:
            keep: most files; keep_mb: most MB of them together; per_client: most files of each client that is known.
            active: names that are kept whatever the limits, and don't count: requests that still run.

        Returns:
            The removed ones.

        Raises:
            OSError: the directory can't be listed, or a file not removed.
        """
        sizes = self._listed()
        if len(sizes) <= min(keep, per_client) and sum(sizes.values()) <= keep_mb * _MB:
            return []
        shares = _Shares(sizes, active)
        removed = []
        while (name := shares.next_to_go(keep, keep_mb * _MB, per_client)) is not None:
            path = self._directory / name
            path.unlink(missing_ok=True)
            del sizes[name]
            removed.append(path)
        return removed

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


class _Shares:
    """What each client has of a worker's files that may be removed.

    Args:
        sizes: bytes by name, the latest last.
        active: names that stay, and don't count.
    """

    def __init__(self, sizes: Mapping[str, int], active: Collection[str]) -> None:
        self._sizes = dict(sizes)
        self._ages = {name: number for number, name in enumerate(sizes)}
        self._files, self._bytes = Counter[str](), Counter[str]()
        self._removable: dict[str, deque[str]] = {}
        for name, size in sizes.items():
            if name not in active:
                client = client_of_name(name) or UNKNOWN
                self._files[client] += 1
                self._bytes[client] += size
                self._removable.setdefault(client, deque()).append(name)

    def next_to_go(self, keep: int, keep_bytes: int, per_client: int) -> str | None:
        """The name of a file to remove, which counts no longer; None if there is no need, or nothing to remove."""
        if self._files.total() > keep:
            share = self._files
        elif self._bytes.total() > keep_bytes:
            share = self._bytes
        else:
            known = self._removable.keys() - {UNKNOWN}
            over = next((client for client in sorted(known) if self._files[client] > per_client), None)
            return None if over is None else self._take(over)
        # Of equal ones the one with the oldest file.
        return self._take(max(self._removable, key=lambda client: (share[client], -self._oldest(client))))

    def _oldest(self, client: str) -> int:
        return self._ages[self._removable[client][0]]

    def _take(self, client: str) -> str:
        names = self._removable[client]
        name = names.popleft()
        if not names:
            del self._removable[client]
        self._files[client] -= 1
        self._bytes[client] -= self._sizes[name]
        return name
