"""Records of ended traces: lines of JSON in a rotated file, or Parquet files in a directory.

Owns the Parquet schema and the directory. What a record says is `trace_document.document`, in both formats. A Parquet
file can't be appended to, so records are gathered and written as a part of their own; readers (DuckDB, pandas, Spark)
take the directory as one table. pyarrow is needed for Parquet only (extra `tables`).
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from glassbox.core.statistics import PHASES, STATISTICS
from glassbox.core.trace_arrays import TraceArray, shown_along_tokens
from glassbox.export.private_files import narrow, open_private
from glassbox.export.rotation import BYTES_PER_MB, KEPT_FILES, RotatingFile
from glassbox.export.trace_document import flat_signals
from glassbox.store.trusted_file import make_folder

if TYPE_CHECKING:
    import pyarrow as pa

# A part is written when it has so many records, or when the oldest has waited so long: what waits is lost if the
# exporter is killed, as vLLM does to all of its processes when one of them takes too long to end.
_PART_RECORDS: Final = 256
_PART_AGE_S: Final = 10.0
_PART: Final = "traces-"
_SUFFIX: Final = ".parquet"


class Records(Protocol):
    """Somewhere to write records."""

    def write(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Take records; they may be written later."""

    def flush(self, force: bool = False) -> None:
        """Write what has waited long enough, or everything."""


class JsonlRecords:
    """One line per ended trace, in a file that is rotated like the window summaries.

    Args:
        path: of the file. max_mb: size (in 10^6 bytes) at which it is rotated.
    """

    def __init__(self, path: Path, max_mb: int) -> None:
        self._file = RotatingFile(path, max_mb * BYTES_PER_MB)

    def write(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Append records.

        Raises:
            OSError: they can't be written; none of them is.
        """
        self._file.append([json.dumps(one, allow_nan=False, separators=(",", ":")) for one in documents])

    def flush(self, force: bool = False) -> None:
        """Nothing waits."""


class ParquetRecords:
    """One row per ended trace, in parts `traces-<time>-<process>-<number>.parquet` of a directory.

    Together the parts have at most (1 + KEPT_FILES) x `max_mb`, as a rotated file has; the oldest go first. Other files
    of the directory are left alone.

    Args:
        path: of the directory. max_mb: in 10^6 bytes.

    Raises:
        ModuleNotFoundError: pyarrow is missing.
    """

    def __init__(self, path: Path, max_mb: int) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "requests.records.format parquet needs pyarrow; pip install vllm-glassbox[tables], or use jsonl"
            ) from None
        self._path = Path(path)
        self._max_bytes = max_mb * BYTES_PER_MB * (1 + KEPT_FILES)
        self._waiting: list[Mapping[str, Any]] = []
        self._since = 0.0
        self._number = 0

    def write(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Take records; see `flush`."""
        if documents and not self._waiting:
            self._since = time.monotonic()
        self._waiting += documents

    def flush(self, force: bool = False) -> None:
        """Write a part if there are many records or old ones, or any and `force`.

        Raises:
            OSError: it can't be written. The records wait on, the newest `_PART_RECORDS` of them.
        """
        due = len(self._waiting) >= _PART_RECORDS or time.monotonic() - self._since >= _PART_AGE_S
        if not self._waiting or not (force or due):
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        make_folder(self._path)
        if not self._number:
            for part in self._parts():
                narrow(part)
        self._number += 1
        name = f"{_PART}{time.time_ns() // 1_000_000}-{os.getpid()}-{self._number:06d}{_SUFFIX}"
        temporary = self._path / f".{name}.tmp"
        try:
            table = pa.Table.from_pylist([_flat(one) for one in self._waiting], schema=schema())
            with os.fdopen(open_private(temporary, os.O_WRONLY | os.O_EXCL), "wb") as file:
                pq.write_table(table, file, compression="zstd")
            temporary.replace(self._path / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            del self._waiting[:-_PART_RECORDS]
            raise
        self._waiting.clear()
        self._remove_oldest()

    def _parts(self) -> list[Path]:
        return list(self._path.glob(f"{_PART}*{_SUFFIX}"))

    def _remove_oldest(self) -> None:
        parts = sorted(self._parts(), key=lambda part: part.stat().st_mtime_ns, reverse=True)
        total = 0
        for number, part in enumerate(parts):
            total += part.stat().st_size
            if number and total > self._max_bytes:
                part.unlink(missing_ok=True)


def schema() -> "pa.Schema":
    """Columns of the Parquet parts: the document's fields, nested ones joined by `_`."""
    import pyarrow as pa

    reals, wholes = pa.list_(pa.float64()), pa.list_(pa.int32())
    texts = ["request_id", "internal_id", "engine", "model_name", "requested_model", "adapter", "client"]
    texts += ["why", "status", "traceparent", "options", "scores"]
    columns = [(name, pa.string()) for name in texts]
    columns += [("start_time_s", pa.float64()), ("end_time_s", pa.float64()), ("truncated", pa.bool_())]
    columns += [("notes", pa.list_(pa.string()))]
    columns += [(name, pa.int64()) for name in ("prompt_len", "num_generated", "num_rows", "tokens_left_out")]
    columns += [("layers", wholes), ("heads", wholes), ("signals", pa.map_(pa.string(), pa.float64()))]
    columns += [("probes", pa.map_(pa.string(), pa.float64()))]
    columns += [column for array in shown_along_tokens() for column in _columns(array).items()]
    columns += [(f"{phase.value}_{one.name}", pa.list_(reals)) for phase in PHASES for one in STATISTICS]
    columns += [("text_first_position", pa.int64()), ("text_tokens", pa.list_(pa.string()))]
    return pa.schema(columns)


def _columns(array: TraceArray) -> "dict[str, pa.DataType]":
    """Names and types of the columns for what the document shows of an array along the tokens."""
    import pyarrow as pa

    if array.axes[-1] == "statistic":
        numbers = {f"tokens_{statistic.name}": pa.list_(pa.float64()) for statistic in STATISTICS}
        return {**numbers, "tokens_nonfinite": pa.list_(pa.bool_())}
    is_whole = array.dtype.startswith(("int", "uint")) and not array.averaged
    values = pa.list_(pa.string() if array.labels else pa.int32() if is_whole else pa.float64())
    if array.axes[-1] == "span":
        values = pa.map_(pa.string(), values)
    elif array.axes[-1] == "top_k":
        values = pa.list_(values)
    return {_column(array): values}


def _cells(array: TraceArray, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in these columns; None in those that the document lacks."""
    if array.axes[-1] == "statistic":
        numbers = {f"tokens_{name}": values for name, values in tokens[array.field].items()}
        return {**numbers, "tokens_nonfinite": tokens["nonfinite"]}
    shown: Any = tokens
    for part in array.field.split("."):
        shown = None if shown is None else shown.get(part)
    return {_column(array): list(shown.items()) if array.axes[-1] == "span" else shown}


def _column(array: TraceArray) -> str:
    return "tokens_" + array.field.replace(".", "_")


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    tokens, places, text = document["tokens"], document["places"], document.get("text", {})
    row = {name: value for name, value in document.items() if not isinstance(value, dict)}
    for array in shown_along_tokens():
        row |= _cells(array, tokens)
    for phase in PHASES:
        row |= {f"{phase.value}_{name}": value for name, value in places.get(phase.value, {}).items()}
    return row | {
        "options": json.dumps(document["options"]),
        "signals": list(flat_signals(document["signals"]).items()),
        "scores": json.dumps(scores) if (scores := document.get("scores")) else None,
        "probes": [(name, one["score"]) for name, one in (scores or {}).get("probes", {}).items()],
        "tokens_left_out": tokens["left_out"],
        "text_first_position": text.get("first_position"),
        "text_tokens": text.get("tokens"),
    }


def open_records(path: Path, format: str, max_mb: int) -> Records:
    """The sink of a format: jsonl or parquet.

    Raises:
        ModuleNotFoundError: parquet without pyarrow.
    """
    return ParquetRecords(path, max_mb) if format == "parquet" else JsonlRecords(path, max_mb)
