"""The record of one traced request, and its file.

Owns what is known of a traced request, the format in which a worker leaves it in the run directory, and how the records
of several ranks become one. Where a record comes from is `processes/worker/traces/tracker.py`, how a directory of them
is read and kept small `trace_directory.py`, what clients may ask `core/trace_options.py`, whose names can be imported
from here, too.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from glassbox.core.files import write_atomically
from glassbox.core.statistics import NUM_STATISTICS, PHASES
from glassbox.core.trace_options import (
    MAX_ROW_KEYS,
    MAX_SPANS,
    MAX_TOP_K,
    ClientChoice,
    MessageSpan,
    OptionError,
    Span,
    TraceOptions,
    parse_options,
)

__all__ = [
    "FORMAT_VERSION",
    "MAX_ROW_KEYS",
    "MAX_SPANS",
    "MAX_TOP_K",
    "ClientChoice",
    "MessageSpan",
    "OptionError",
    "RequestTrace",
    "Span",
    "TraceOptions",
    "external_id",
    "merge_ranks",
    "parse_options",
    "read_header",
    "read_trace",
    "trace_name",
    "trace_prefix",
    "write_trace",
]

FORMAT_VERSION: Final = 2
Why = Literal["opt_in", "sampled"]
Status = Literal["active", "finished", "aborted", "lost"]

_INTERNAL: Final = re.compile(r"(?:\d+_)?(?P<external>.+)-[0-9a-f]{8}", re.DOTALL)
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.]")
_NAME_CHARS: Final = 80
_NO_POSITION: Final = -1


def external_id(internal_id: str) -> str:
    """The id that the client sees, of vLLM's internal one.

    vLLM 0.32 appends eight characters (`InputProcessor.assign_request_id`), and writes `<index>_` before the samples
    of a request with n > 1 (`ParentRequest.get_child_info`), which therefore share an external id.
    """
    match = _INTERNAL.fullmatch(internal_id)
    return match["external"] if match else internal_id


@dataclass(frozen=True, eq=False)
class RequestTrace:
    """All that is known of one traced request on one worker, or merged over workers.

    T kept rows (positions of the sequence), L layers, H heads, k = top_k, S spans.

    Attributes:
        request_id: external id, as the client sees it; the samples of a request with n > 1 share it.
        internal_id: vLLM's own.
        engine, rank, model_name, instance: of the worker; see store/snapshot.py.
        why: opt_in if the client asked, sampled if trace_rate chose it.
        status: finished also if it can't be told from aborted; lost if the worker ended first.
        start_time_s, end_time_s: Unix seconds of its first step and of the step in which the worker heard of its end;
            None while it is active.
        prompt_len, num_generated: tokens. The last generated token is never an input, so it has no row.
        traceparent: W3C trace context that came with the request, or None.
        layers, heads: global index of each along the axes L and H.
        positions: int32 [T], ascending, so prefill rows come first. A position that was computed again after a
            preemption stands there once.
        phases: uint8 [T], index into statistics.PHASES.
        stats: float32 [T, L, H, NUM_STATISTICS + 1], columns as in statistics.py, the last is 1 where a score was not
            finite. NaN is "no value".
        topk_positions, topk_mass: int32 and float32 [T, L, H, k], by falling mass; -1 and 0 where there are fewer keys.
        mean_topk_positions, mean_topk_mass: [T, k], of the attention averaged over these layers and heads.
        span_names: of the S spans. span_ranges: int32 [S, 2], start and exclusive end.
        span_mass: float32 [T, L, H, S], sum of the attention to the span's positions.
        row_values: float16, the full rows one after the other; `row` cuts them. Empty if not asked for.
        row_offsets: int64 [T + 1] into `row_values`.
        row_starts: int32 [T], position of the first key kept of each row.
        options: that the request gave.
        truncated: True if a limit ended the collecting; what is there is right, later rows are missing.
        token_ids: int32 [prompt_len + num_generated], or empty without `requests.include_text`.

    Raises:
        ValueError: an array has another shape.
    """

    request_id: str
    internal_id: str
    engine: str
    rank: int
    model_name: str
    instance: str
    why: Why
    status: Status
    start_time_s: float
    end_time_s: float | None
    prompt_len: int
    num_generated: int
    traceparent: str | None
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    options: TraceOptions
    truncated: bool
    positions: npt.NDArray[np.int32]
    phases: npt.NDArray[np.uint8]
    stats: npt.NDArray[np.float32]
    topk_positions: npt.NDArray[np.int32]
    topk_mass: npt.NDArray[np.float32]
    mean_topk_positions: npt.NDArray[np.int32]
    mean_topk_mass: npt.NDArray[np.float32]
    span_mass: npt.NDArray[np.float32]
    span_names: tuple[str, ...]
    span_ranges: npt.NDArray[np.int32]
    row_values: npt.NDArray[np.float16]
    row_offsets: npt.NDArray[np.int64]
    row_starts: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        rows, place = len(self.positions), (len(self.layers), len(self.heads))
        k, spans = self.topk_mass.shape[-1], len(self.span_names)
        wanted: dict[str, tuple[int, ...]] = {
            "positions": (rows,),
            "phases": (rows,),
            "stats": (rows, *place, NUM_STATISTICS + 1),
            "topk_positions": (rows, *place, k),
            "topk_mass": (rows, *place, k),
            "mean_topk_positions": (rows, k),
            "mean_topk_mass": (rows, k),
            "span_mass": (rows, *place, spans),
            "span_ranges": (spans, 2),
        }
        if self.has_rows:
            wanted |= {"row_offsets": (rows + 1,), "row_starts": (rows,)}
        for name, shape in wanted.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(found)}")

    @property
    def has_rows(self) -> bool:
        """True if full attention rows were kept."""
        return bool(len(self.row_offsets))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def row(self, t: int) -> npt.NDArray[np.float16]:
        """Attention [L, H, keys] of kept row `t` to the positions from `row_starts[t]` to its own.

        Raises:
            ValueError: the request did not ask for rows.
        """
        if not self.has_rows:
            raise ValueError("rows must have been asked for, with glassbox_rows: 1; this trace has none")
        values = self.row_values[self.row_offsets[t] : self.row_offsets[t + 1]]
        return values.reshape(len(self.layers), len(self.heads), -1)

    def decode(self) -> npt.NDArray[np.bool_]:
        """Which rows are of generated tokens, [T]."""
        return self.phases == PHASES.index("decode")


_ARRAYS: Final = (
    "positions",
    "phases",
    "stats",
    "topk_positions",
    "topk_mass",
    "mean_topk_positions",
    "mean_topk_mass",
    "span_mass",
    "span_ranges",
    "row_values",
    "row_offsets",
    "row_starts",
    "token_ids",
)
_HEADER: Final = tuple(f.name for f in fields(RequestTrace) if f.name not in _ARRAYS)


def trace_name(engine: str, rank: int, instance: str, internal_id: str) -> str:
    """File name of a request's trace on one worker.

    A client chooses a part of the id: it is cut and cleaned, and a digest keeps names apart.
    """
    digest = hashlib.sha256(internal_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    clean = [_UNSAFE.sub("_", part) for part in (instance, internal_id[:_NAME_CHARS])]
    return f"{trace_prefix(engine, rank)}{clean[0]}-{clean[1]}-{digest}.npz"


def trace_prefix(engine: str, rank: int) -> str:
    """How the names of a worker's files begin, and those of its predecessors after a restart."""
    return f"trace-{_UNSAFE.sub('_', engine)}-{rank}-"


def write_trace(directory: Path, trace: RequestTrace) -> Path:
    """Write a trace: a reader sees the old file or the new one, never a part.

    Returns:
        The path of the file.

    Raises:
        OSError: it cannot be written. No temporary file is left behind, and an older one of the request stays.
    """
    path = Path(directory) / trace_name(trace.engine, trace.rank, trace.instance, trace.internal_id)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, _encode(trace))
    return path


def _encode(trace: RequestTrace) -> bytes:
    header: dict[str, Any] = {name: getattr(trace, name) for name in _HEADER}
    header["options"] = asdict(trace.options)
    header["num_rows"] = len(trace.positions)
    arrays: dict[str, np.ndarray] = {name: getattr(trace, name) for name in _ARRAYS}
    # Each array of an archive costs a worker 0.1 ms, and most traces leave half of them empty.
    header["empty"] = {name: (array.dtype.name, array.shape) for name, array in arrays.items() if not array.size}
    text = json.dumps({"format": FORMAT_VERSION, **header})
    buffer = io.BytesIO()
    filled: dict[str, Any] = {name: array for name, array in arrays.items() if array.size}
    np.savez(buffer, header=np.frombuffer(text.encode(), dtype=np.uint8), **filled)
    return buffer.getvalue()


def read_trace(path: Path) -> RequestTrace:
    """Read what `write_trace` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a trace of this format.
    """
    data = Path(path).read_bytes()
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            header = _decode_header(bytes(archive["header"]))
            empty = header.pop("empty")
            arrays: dict[str, Any] = {name: np.empty(shape, dtype=dtype) for name, (dtype, shape) in empty.items()}
            arrays |= {name: archive[name] for name in _ARRAYS if name not in empty}
        header.pop("num_rows")
        return RequestTrace(**header, **arrays)
    except Exception as error:  # garbage can fail anywhere in zip, npy, JSON or shapes
        raise _unreadable(path, error) from error


def read_header(path: Path) -> dict[str, Any]:
    """The fields of a trace that are no arrays, and `num_rows`; reads only that part of the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a trace of this format.
    """
    with Path(path).open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                header = _decode_header(bytes(archive["header"]))
            del header["empty"]
            return header
        except Exception as error:  # as above
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{Path(path).name} must be a trace of format {FORMAT_VERSION}: {type(error).__name__}: {error}")


def _decode_header(text: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(text)
    if header.pop("format", None) != FORMAT_VERSION:
        raise ValueError(f"format must be {FORMAT_VERSION}")
    for name in ("layers", "heads", "span_names"):
        header[name] = tuple(header[name])
    options = header["options"]
    header["options"] = TraceOptions(
        layers=None if options["layers"] is None else tuple(options["layers"]),
        heads=None if options["heads"] is None else tuple(options["heads"]),
        top_k=options["top_k"],
        spans=tuple(Span(**span) for span in options["spans"]),
        rows=options["rows"],
    )
    return header


def merge_ranks(traces: Sequence[RequestTrace]) -> RequestTrace:
    """One trace of a request's traces on the workers of its engine.

    Tensor-parallel ranks bring heads, pipeline stages layers. Rows are those that all of them have: while a request
    runs, one worker's file may be older. A place that no worker measured holds NaN, and no positions. The positions of
    `mean_topk` are chosen among those of the workers, and their mass is a lower bound with several.

    Raises:
        ValueError: `traces` is empty or of several requests.
    """
    if not traces:
        raise ValueError("traces must have at least one element, got none")
    if len({(trace.engine, trace.internal_id) for trace in traces}) > 1:
        raise ValueError("traces must be of one request; merge each request by itself")
    if len(traces) == 1:
        return traces[0]
    # The lowest rank stands for heads that several hold (replicated ones).
    parts = sorted(traces, key=lambda t: (t.rank, t.layers, t.start_time_s, t.instance))
    positions = parts[0].positions
    for part in parts[1:]:
        positions = np.intersect1d(positions, part.positions)
    layers = tuple(sorted({layer for part in parts for layer in part.layers}))
    heads = tuple(sorted({head for part in parts for head in part.heads}))
    k = max(part.topk_mass.shape[-1] for part in parts)
    shape = (len(positions), len(layers), len(heads))
    first = parts[0]
    stats = np.full((*shape, NUM_STATISTICS + 1), np.nan, dtype=np.float32)
    topk_positions = np.full((*shape, k), _NO_POSITION, dtype=np.int32)
    topk_mass = np.zeros((*shape, k), dtype=np.float32)
    span_mass = np.full((*shape, len(first.span_names)), np.nan, dtype=np.float32)
    rows = _Rows(parts, positions, layers, heads) if all(part.has_rows for part in parts) else None
    for part in reversed(parts):
        take = np.searchsorted(part.positions, positions)
        at = np.ix_(np.arange(len(positions)), np.searchsorted(layers, part.layers), np.searchsorted(heads, part.heads))
        stats[at] = part.stats[take]
        topk_positions[at] = part.topk_positions[take]
        topk_mass[at] = part.topk_mass[take]
        span_mass[at] = part.span_mass[take]
    mean_positions, mean_mass = _merge_means(parts, positions, k)
    ends = [part.end_time_s for part in parts]
    active = any(part.status == "active" for part in parts)
    return replace(
        first,
        status="active" if active else first.status,
        start_time_s=min(part.start_time_s for part in parts),
        end_time_s=None if active else max((end for end in ends if end is not None), default=None),
        num_generated=max(part.num_generated for part in parts),
        layers=layers,
        heads=heads,
        truncated=any(part.truncated for part in parts),
        positions=positions,
        phases=first.phases[np.searchsorted(first.positions, positions)],
        stats=stats,
        topk_positions=topk_positions,
        topk_mass=topk_mass,
        mean_topk_positions=mean_positions,
        mean_topk_mass=mean_mass,
        span_mass=span_mass,
        row_values=rows.values if rows else first.row_values[:0],
        row_offsets=rows.offsets if rows else first.row_offsets[:0],
        row_starts=rows.starts if rows else first.row_starts[:0],
    )


def _merge_means(
    parts: Sequence[RequestTrace], positions: npt.NDArray[np.int32], k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The k positions with most mass among those of the parts, each part weighted by its layers and heads."""
    places = np.array([len(part.layers) * len(part.heads) for part in parts], dtype=np.float64)
    weights = places / max(places.sum(), 1)
    found = np.full((len(positions), k), _NO_POSITION, dtype=np.int32)
    mass = np.zeros((len(positions), k), dtype=np.float32)
    takes = [np.searchsorted(part.positions, positions) for part in parts]
    for t in range(len(positions)):
        total: dict[int, float] = {}
        for part, take, weight in zip(parts, takes, weights, strict=True):
            row = take[t]
            for key, value in zip(
                part.mean_topk_positions[row].tolist(), part.mean_topk_mass[row].tolist(), strict=True
            ):
                if key != _NO_POSITION:
                    total[key] = total.get(key, 0.0) + weight * value
        best = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:k]
        for i, (key, value) in enumerate(best):
            found[t, i], mass[t, i] = key, value
    return found, mass


class _Rows:
    """Full rows of several workers, put together."""

    def __init__(
        self,
        parts: Sequence[RequestTrace],
        positions: npt.NDArray[np.int32],
        layers: tuple[int, ...],
        heads: tuple[int, ...],
    ) -> None:
        values, lengths = [], []
        takes = [np.searchsorted(part.positions, positions) for part in parts]
        self.starts = parts[0].row_starts[takes[0]]
        for t in range(len(positions)):
            keys = parts[0].row(takes[0][t]).shape[-1]
            whole = np.full((len(layers), len(heads), keys), np.nan, dtype=np.float16)
            for part, take in reversed(list(zip(parts, takes, strict=True))):
                whole[np.ix_(np.searchsorted(layers, part.layers), np.searchsorted(heads, part.heads))] = part.row(
                    take[t]
                )
            values.append(whole.ravel())
            lengths.append(whole.size)
        self.values = np.concatenate(values) if values else np.zeros(0, dtype=np.float16)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
