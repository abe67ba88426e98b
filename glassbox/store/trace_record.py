"""The record of one traced request, and its file.

Owns what is known of a traced request, and the format in which a worker leaves it in the run directory. Its arrays are
those of `core/trace_arrays.py`. Where a record comes from is `processes/worker/traces/tracker.py`, how those of several
ranks become one `trace_ranks.py`, how a directory of them is read and kept small `trace_directory.py`, what clients may
ask `core/trace_options.py`, whose names can be imported from here, too.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np
import numpy.typing as npt

from glassbox.core import trace_arrays
from glassbox.core.array_file import ArrayFile
from glassbox.core.statistics import PHASES
from glassbox.core.trace_arrays import Sizes, trace_array
from glassbox.core.trace_options import (
    MAX_ATTENTION_KEYS,
    MAX_SPANS,
    MAX_TOP_K,
    ClientChoice,
    MessageSpan,
    OptionError,
    Span,
    TraceOptions,
    parse_options,
)
from glassbox.store.file_names import clean, request_digest
from glassbox.store.trusted_file import make_folder, open_file, write_file

__all__ = [
    "FORMAT_VERSION",
    "MAX_ATTENTION_KEYS",
    "MAX_SPANS",
    "MAX_TOP_K",
    "UNKNOWN",
    "ClientChoice",
    "MessageSpan",
    "OptionError",
    "RequestTrace",
    "Span",
    "TraceOptions",
    "call_and_sample",
    "client_of_name",
    "decode_trace",
    "encode_trace",
    "external_id",
    "is_of_client",
    "joined_attention",
    "may_be_of",
    "no_attention",
    "parse_options",
    "read_header",
    "read_trace",
    "trace_name",
    "trace_prefix",
    "trace_suffix",
    "write_trace",
]

FORMAT_VERSION: Final = 7
Why = Literal["opt_in", "sampled"]
Status = Literal["active", "finished", "aborted", "lost"]

_INTERNAL: Final = re.compile(r"(?:\d+_)?(?P<external>.+)-[0-9a-f]{8}", re.DOTALL)
# Of the digest at a name's end.
_DIGITS: Final = 12
# In names, of a client that isn't known.
UNKNOWN: Final = "unknown"
_NAME_CHARS: Final = 80
# The most that requests.max_trace_mb allows, and what is around it.
MAX_BYTES: Final = 4096 * 1_000_000 + (1 << 24)
# Of a name, apart at its dashes: trace, engine, rank, instance, client, id, digest.
_NAME_PARTS: Final = 7
_CLIENT_AT: Final = 4
_ID_AT: Final = 5
_SAMPLE: Final = re.compile(r"^\d+_(?=.)")


def external_id(internal_id: str) -> str:
    """The id that the client sees, of vLLM's internal one.

    vLLM 0.32 appends eight characters (`InputProcessor.assign_request_id`), and writes `<index>_` before the samples
    of a request with n > 1 (`ParentRequest.get_child_info`), which therefore share an external id.
    """
    match = _INTERNAL.fullmatch(internal_id)
    return match["external"] if match else internal_id


def call_and_sample(internal_id: str) -> tuple[str, int]:
    """What the samples of one request share of their internal ids, and the number of this one (-1: there is one)."""
    match = _SAMPLE.match(internal_id)
    return (internal_id[match.end() :], int(match[0][:-1][:9])) if match else (internal_id, -1)


@dataclass(frozen=True, eq=False)
class RequestTrace:
    """All that is known of one traced request on one worker, or merged over workers.

    Each array of core/trace_arrays.py is an attribute by its name, too: `trace.stats` is `trace.arrays["stats"]`.

    Attributes:
        request_id: external id, as the client sees it; the samples of a request with n > 1 share it.
        internal_id: vLLM's own.
        engine, rank, model_name, instance: of the worker; see store/snapshot.py.
        requested_model: the name by which the client asked for the model, as far as it is known; else that of the
            adapter or of the model.
        adapter: name of its LoRA adapter, None if it has none.
        client: who asked, as store/client_names.py names it; None if it isn't known.
        why: opt_in if the client asked, sampled if trace_rate chose it.
        status: finished also if it can't be told from aborted; lost if the worker ended first.
        start_time_s, end_time_s: Unix seconds of its first step and of the step in which the worker heard of its end;
            None while it is active.
        prompt_len, num_generated: tokens. The last generated token is never an input, so it has no row.
        traceparent: W3C trace context that came with the request, or None.
        layers, heads: global index of each along the axes L and H.
        options: that the request gave.
        truncated: True if a limit left rows out: of memory (all later ones are missing) or of overhead_budget (those of
            some steps are); what is there is right.
        span_names: of the S spans.
        arrays: by name, all of the table; T kept rows, L layers, H heads, k = top_k, S spans.
        notes: what of it is missing or was refused, and why, in words.

    Raises:
        ValueError: an array is missing, not of the table, or has another shape or type.
    """

    request_id: str
    internal_id: str
    engine: str
    rank: int
    model_name: str
    instance: str
    requested_model: str
    adapter: str | None
    client: str | None
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
    span_names: tuple[str, ...]
    arrays: Mapping[str, npt.NDArray[Any]]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = {array.name for array in trace_arrays.TRACE_ARRAYS}
        if names != self.arrays.keys():
            raise ValueError(f"arrays must be those of the table; differing: {sorted(names ^ self.arrays.keys())}")
        sizes = self.sizes
        for array in trace_arrays.TRACE_ARRAYS:
            found, shape = self.arrays[array.name], array.shape(sizes)
            if found.ndim != len(shape) or any(n not in {None, m} for n, m in zip(shape, found.shape, strict=True)):
                raise ValueError(f"{array.name} must have shape {list(shape)}, got {list(found.shape)}")
            if found.dtype != array.dtype:
                raise ValueError(f"{array.name} must have type {array.dtype}, got {found.dtype}")

    def __getattr__(self, name: str) -> npt.NDArray[Any]:
        try:
            values: npt.NDArray[Any] = self.__dict__["arrays"][name]
        except KeyError:
            raise AttributeError(f"a trace has no {name}; its arrays are listed in core/trace_arrays.py") from None
        return values

    @property
    def sizes(self) -> Sizes:
        """Of the axes of its arrays."""
        rows = len(self.positions)
        return {
            "token": rows,
            "layer": len(self.layers),
            "head": len(self.heads),
            "top_k": self.topk_mass.shape[-1],
            "span": len(self.span_names),
            "kept_token": rows if self.has_attention else 0,
            "offset": rows + 1 if self.has_attention else 0,
            "position": self.received.shape[-1],
            "squared_position": self.received_squares.shape[-1],
            "singular": self.singular_values.shape[-1],
            "dim": self.queries.shape[-1],
            "param": self.score_params.shape[-1],
        }

    @property
    def has_attention(self) -> bool:
        """True if the whole attention of each row was kept."""
        return bool(len(self.attention_offsets))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def attention(self, t: int) -> npt.NDArray[np.float16]:
        """Attention [L, H, keys] of kept row `t` to the positions from `attention_starts[t]` to its own.

        Raises:
            ValueError: the request did not ask for it.
        """
        if not self.has_attention:
            raise ValueError("rows must have been asked for, with glassbox_rows: 1; this trace has none")
        values = self.attention_values[self.attention_offsets[t] : self.attention_offsets[t + 1]]
        return values.reshape(len(self.layers), len(self.heads), -1)

    def decode(self) -> npt.NDArray[np.bool_]:
        """Which rows are of generated tokens, [T]."""
        return self.phases == PHASES.index("decode")


_HEADER: Final = tuple(f.name for f in fields(RequestTrace) if f.name != "arrays")


def joined_attention(
    of_rows: Sequence[npt.NDArray[np.float16]], starts: npt.NDArray[np.int32]
) -> dict[str, npt.NDArray[Any]]:
    """The arrays that hold whole attention vectors.

    Args:
        of_rows: [L, H, keys] of each row.
        starts: int32 [T], position of the first of these keys.
    """
    none = no_attention()
    return {
        "attention_values": np.concatenate([none["attention_values"], *(values.ravel() for values in of_rows)]),
        "attention_offsets": np.cumsum([0, *(values.size for values in of_rows)], dtype=np.int64),
        "attention_starts": starts,
    }


def no_attention() -> dict[str, npt.NDArray[Any]]:
    """The same of a request that did not ask for them."""
    names = ("attention_values", "attention_offsets", "attention_starts")
    return {name: trace_array(name).filled({}) for name in names}


def trace_name(engine: str, rank: int, instance: str, client: str | None, internal_id: str) -> str:
    """File name of a request's trace on one worker.

    A client chooses a part of the id: it is cut and cleaned, and a digest keeps names apart. The client's own name is
    part of it, so that whose a file is can be told without reading it, and no client's file replaces another's.
    """
    parts = (clean(instance), _client_part(client), _clean_id(internal_id))
    return f"{trace_prefix(engine, rank)}{'-'.join(parts)}{trace_suffix(client, internal_id)}"


def trace_suffix(client: str | None, internal_id: str) -> str:
    """How the names of a request's traces end, on whichever worker."""
    return f"-{request_digest(internal_id, client)[:_DIGITS]}.npz"


def client_of_name(name: str) -> str | None:
    """The client's part of a name that `trace_name` made; None of another name."""
    parts = _parts(name)
    return None if parts is None else parts[_CLIENT_AT]


def is_of_client(name: str, client: str) -> bool:
    """Whether a file of that name holds a trace of a client."""
    return client_of_name(name) == _client_part(client)


def may_be_of(name: str, request_id: str) -> bool:
    """Whether the id of the trace in a file of that name may begin with `request_id`: without reading it."""
    parts = _parts(name)
    if parts is None:
        return False
    found, wanted = parts[_ID_AT], _clean_id(request_id)
    return any(
        rest.startswith(wanted) or (len(found) == _NAME_CHARS and wanted.startswith(rest))
        for rest in (found, _SAMPLE.sub("", found))
    )


def _clean_id(request_id: str) -> str:
    return clean(request_id[:_NAME_CHARS])


def _client_part(client: str | None) -> str:
    return clean(client or UNKNOWN)


def _parts(name: str) -> list[str] | None:
    parts = name.split("-")
    return parts if len(parts) == _NAME_PARTS else None


def trace_prefix(engine: str, rank: int) -> str:
    """How the names of a worker's files begin, and those of its predecessors after a restart."""
    return f"trace-{clean(engine)}-{rank}-"


def write_trace(directory: Path, trace: RequestTrace) -> Path:
    """Write a trace: a reader sees the old file or the new one, never a part.

    Returns:
        The path of the file.

    Raises:
        OSError: it cannot be written. No temporary file is left behind, and an older one of the request stays.
    """
    path = Path(directory) / trace_name(trace.engine, trace.rank, trace.instance, trace.client, trace.internal_id)
    make_folder(path.parent)
    # Not encode_trace: a worker copies megabytes once less.
    write_file(path, _archive(trace).getbuffer())
    return path


def encode_trace(trace: RequestTrace) -> bytes:
    """The content of a trace's file."""
    return _archive(trace).getvalue()


def _archive(trace: RequestTrace) -> io.BytesIO:
    header: dict[str, Any] = {name: getattr(trace, name) for name in _HEADER}
    header["options"] = asdict(trace.options)
    header["num_rows"] = len(trace.positions)
    # Each array of an archive costs a worker 0.1 ms, and most traces leave half of them empty.
    header["empty"] = {name: array.shape for name, array in trace.arrays.items() if not array.size}
    text = json.dumps({"format": FORMAT_VERSION, **header})
    buffer = io.BytesIO()
    filled: dict[str, Any] = {name: array for name, array in trace.arrays.items() if array.size}
    np.savez(buffer, header=np.frombuffer(text.encode(), dtype=np.uint8), **filled)
    return buffer


def read_trace(path: Path) -> RequestTrace:
    """Read what `write_trace` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a trace of this format.
    """
    with open_file(Path(path), MAX_BYTES) as file:
        return _decode(file, Path(path).name)


def decode_trace(content: bytes, name: str) -> RequestTrace:
    """What `encode_trace` made.

    Args:
        name: of the content, for the error.

    Raises:
        ValueError: it is not a trace of this format.
    """
    return _decode(io.BytesIO(content), name)


def _decode(file: BinaryIO, name: str) -> RequestTrace:
    try:
        archive = ArrayFile(file, MAX_BYTES)
        header = _decode_header(archive)
        empty = {name: _empty(name, shape) for name, shape in header.pop("empty").items()}
        filled = [array.name for array in trace_arrays.TRACE_ARRAYS if array.name not in empty]
        header.pop("num_rows")
        return RequestTrace(**header, arrays={**empty, **archive.read(filled)})
    except Exception as error:  # garbage can fail anywhere in zip, npy, JSON or shapes
        raise _unreadable(name, error) from error


def read_header(path: Path) -> dict[str, Any]:
    """The fields of a trace that are no arrays, and `num_rows`; reads only that part of the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a trace of this format.
    """
    with open_file(Path(path), MAX_BYTES) as file:
        try:
            header = _decode_header(ArrayFile(file, MAX_BYTES))
            del header["empty"]
            return header
        except Exception as error:  # as above
            raise _unreadable(Path(path).name, error) from error


def _unreadable(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} must be a trace of format {FORMAT_VERSION}: {type(error).__name__}: {error}")


def _empty(name: str, shape: Sequence[int]) -> npt.NDArray[Any]:
    if 0 not in shape:  # a few bytes must not ask for gigabytes
        raise ValueError(f"{name} must be empty, got shape {list(shape)}")
    return np.empty(tuple(shape), trace_array(name).dtype)


def _decode_header(archive: ArrayFile) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(archive.read(["header"])["header"].tobytes())
    if header.pop("format", None) != FORMAT_VERSION:
        raise ValueError(f"format must be {FORMAT_VERSION}")
    for name in ("layers", "heads", "span_names", "notes"):
        header[name] = tuple(header[name])
    options = header["options"]
    header["options"] = TraceOptions(
        layers=None if options["layers"] is None else tuple(options["layers"]),
        heads=None if options["heads"] is None else tuple(options["heads"]),
        top_k=options["top_k"],
        spans=tuple(Span(**span) for span in options["spans"]),
        attention=options["attention"],
        prompt=options["prompt"],
        signals=tuple(options["signals"]),
        respond=options["respond"],
    )
    return header
