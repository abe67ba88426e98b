"""The table of features: a Parquet file with a row for each sample and a column for each feature.

Owns its columns, what the file says of itself, and reading it; pyarrow is the extra `tables`. Beside the features
(float32, named as in `signals/features.py`, null where there is no value) it has

sample: number of the sample in its file, from 0. id, label, group: as there.
problem: why it has no features, in words; null if it has.
truncated: whether rows are missing, see docs/requests.md.
prompt_tokens, answer_tokens: lengths. answer: its text, generated or given.

The file's metadata has a key `glassbox`: JSON of `TableOrigin`. Whatever else is in a table (columns that somebody
added) is left alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core.json_fields import FieldError, JsonFields, parse_json
from glassbox.core.printable import printable
from glassbox.signals.features import Feature, features, parse_feature
from glassbox.store.trace_record import RequestTrace
from glassbox.view.input_file import open_file
from glassbox.view.measured import ViewError
from glassbox.view.samples.samples_file import MAX_SAMPLES, Sample

if TYPE_CHECKING:
    import pyarrow as pa

MAX_BYTES: Final = 8 << 30
# Of numbers in memory: 2 GB.
MAX_CELLS: Final = 1 << 29
# A few kilobytes can hold any number of equal rows and texts: what they unpack to is bounded, too.
MAX_UNPACKED_BYTES: Final = 8 << 30
MAX_TEXT_BYTES: Final = 1 << 28
_TEXTS: Final = ("id", "group", "problem")
_LENGTHS: Final = ("prompt_tokens", "answer_tokens")
_KEY: Final = b"glassbox"
_FORMAT: Final = "glassbox-features"
_VERSION: Final = 1
_REMEDY: Final = "make one with `glassbox extract`"


@dataclass(frozen=True)
class SampleRow:
    """One row; see the module."""

    sample: int
    id: str
    label: bool | None
    group: str | None
    problem: str | None
    truncated: bool
    prompt_tokens: int
    answer_tokens: int
    answer: str | None
    features: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, sample: Sample, trace: RequestTrace, *, prompt_tokens: int, answer_tokens: int, answer: str | None
    ) -> "SampleRow":
        """Of a sample that was measured."""
        about = (sample.index, sample.id, sample.label, sample.group)
        return cls(*about, None, trace.truncated, prompt_tokens, answer_tokens, answer, features(trace))

    @classmethod
    def without(cls, sample: Sample, problem: str) -> "SampleRow":
        """Of one that can't be asked."""
        return cls(sample.index, sample.id, sample.label, sample.group, problem, False, 0, 0, sample.answer)


@dataclass(frozen=True)
class TableOrigin:
    """Where a table's numbers come from.

    Attributes:
        model_name: as it was asked for.
        glassbox_version: that measured.
        data: name of the file of samples.
        date: ISO 8601, UTC.
    """

    model_name: str
    glassbox_version: str
    data: str
    date: str


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """A table that was read, without the samples that have a problem.

    Attributes:
        path: of the file.
        origin: None if the file doesn't say.
        ids: of the n samples.
        labels: int8 [n]; -1 if it isn't known.
        groups: of each sample; None if the table has none.
        lengths: int64 [n, 2], tokens of prompt and answer.
        features: what the F columns are.
        values: float32 [n, F]; NaN where there is no value.
        problems: how many samples were left out.
    """

    path: Path
    origin: TableOrigin | None
    ids: tuple[str, ...]
    labels: npt.NDArray[np.int8]
    groups: tuple[str, ...] | None
    lengths: npt.NDArray[np.int64]
    features: tuple[Feature, ...]
    values: npt.NDArray[np.float32]
    problems: int

    @property
    def model_name(self) -> str:
        """Of its origin."""
        return "unknown" if self.origin is None else self.origin.model_name

    def labelled(self) -> "FeatureTable":
        """The samples with a label.

        Raises:
            ViewError: it has not both kinds.
        """
        known = self.labels >= 0
        positives, negatives = int((self.labels == 1).sum()), int((self.labels == 0).sum())
        if not positives or not negatives:
            raise ViewError(
                f"{self.path} must have samples with label true and with label false, got {positives} and {negatives}; "
                "give more of the data labels"
            )
        return self.of(np.flatnonzero(known))

    def of(self, rows: npt.NDArray[np.intp]) -> "FeatureTable":
        """These samples only."""
        groups = None if self.groups is None else tuple(self.groups[i] for i in rows)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in rows),
            labels=self.labels[rows],
            groups=groups,
            lengths=self.lengths[rows],
            values=self.values[rows],
        )

    def matching(self, pattern: str) -> "FeatureTable":
        """The features whose names match, as a shell matches files.

        Raises:
            ViewError: none does.
        """
        columns = [i for i, feature in enumerate(self.features) if fnmatchcase(feature.name, pattern)]
        if not columns:
            example = self.features[0].name
            raise ViewError(f"no feature of {self.path} matches {pattern!r}; they have names such as {example}")
        chosen = tuple(self.features[i] for i in columns)
        return replace(self, features=chosen, values=self.values[:, columns])


def to_arrow(rows: Sequence[SampleRow], origin: TableOrigin) -> "pa.Table":
    """The table of some samples; the columns are the features that any of them has, by name."""
    import pyarrow as pa

    columns = {name: pa.array([getattr(row, name) for row in rows], type=kind) for name, kind in _own(pa).items()}
    names = dict.fromkeys(name for row in rows for name in row.features)
    for name in names:
        columns[name] = pa.array([row.features.get(name) for row in rows], type=pa.float32())
    return pa.table(columns).replace_schema_metadata({_KEY: _encoded(origin)})


def _own(pa: Any) -> dict[str, Any]:
    """Columns that are no features, with their types."""
    return {
        "sample": pa.int64(),
        "id": pa.string(),
        "label": pa.bool_(),
        "group": pa.string(),
        "problem": pa.string(),
        "truncated": pa.bool_(),
        "prompt_tokens": pa.int32(),
        "answer_tokens": pa.int32(),
        "answer": pa.string(),
    }


def _encoded(origin: TableOrigin) -> bytes:
    return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(origin)}).encode()


def read_table(path: Path) -> FeatureTable:
    """Read a table.

    Raises:
        ViewError: it can't be read, is too large, or lacks what a table of features has.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_file(path, MAX_BYTES, _REMEDY) as file:
        try:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            columns = _features(path, names)
            wanted = [*(name for name in ("label", *_TEXTS, *_LENGTHS) if name in names), *columns]
            _check_types(path, parquet.schema_arrow, columns)
            _check_size(path, parquet.metadata, wanted, len(columns))
            # Texts that are the same are there once, as in the file.
            texts = [name for name in _TEXTS if name in names and not _is_number(parquet.schema_arrow.field(name).type)]
            table = pq.ParquetFile(file, metadata=parquet.metadata, read_dictionary=texts).read(wanted)
            _check_texts(path, table)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, ViewError):
                raise
            detail = printable(" ".join(str(error).split())[:200])
            raise ViewError(f"{path} must be a Parquet file ({detail}); {_REMEDY}") from None
    return _read(path, table, columns)


def _check_types(path: Path, schema: "pa.Schema", columns: Mapping[str, Feature]) -> None:
    import pyarrow as pa

    for name in columns:
        if not _is_number(schema.field(name).type):
            raise ViewError(f"{path}: the column {name} must have numbers, got {schema.field(name).type}; {_REMEDY}")
    for name in ("label", *_TEXTS, *_LENGTHS):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_text = name in _TEXTS and (pa.types.is_string(value) or pa.types.is_large_string(value))
        is_flag = name == "label" and pa.types.is_boolean(kind)
        if not (is_text or is_flag or _is_number(kind) or pa.types.is_null(kind)):
            rule = "true and false (1 and 0)" if name == "label" else "texts" if name in _TEXTS else "numbers"
            raise ViewError(f"{path}: the column {name} must have {rule}, got {str(kind)[:80]}; {_REMEDY}")


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _check_size(path: Path, metadata: Any, wanted: Sequence[str], num_features: int) -> None:
    """See what reading would take, before it is done."""
    rows = metadata.num_rows
    if rows > MAX_SAMPLES:
        raise ViewError(f"{path} must have at most {MAX_SAMPLES:,} samples, got {rows:,}; divide it")
    if rows * max(num_features, 1) > MAX_CELLS:
        raise ViewError(f"{path} must have at most {MAX_CELLS:,} numbers, got {rows} rows of {num_features}")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    parts = [group.column(i) for group in groups for i in range(group.num_columns)]
    size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema in wanted)
    if size > MAX_UNPACKED_BYTES:
        raise ViewError(f"{path} must unpack to at most {MAX_UNPACKED_BYTES >> 30} GB, got {size >> 30}; divide it")


def _check_texts(path: Path, table: "pa.Table") -> None:
    """See that a column's texts can be had one by one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in _TEXTS:
        size = 0
        for chunk in table[name].chunks if name in table.column_names else ():
            if pa.types.is_dictionary(chunk.type):
                size += pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices)).as_py() or 0
        if size > MAX_TEXT_BYTES:
            raise ViewError(
                f"{path}: the texts of {name} must take at most {MAX_TEXT_BYTES >> 20} MB, got {size >> 20}"
            )


def _features(path: Path, names: Sequence[str]) -> dict[str, Feature]:
    columns: dict[str, Feature] = {}
    for name in names:
        try:
            columns[name] = parse_feature(name)
        except ValueError:
            continue
    if not columns and "problem" in names:
        raise ViewError(f"{path} has features of none of its samples: its column `problem` says why; extract it again")
    if not columns or "label" not in names:
        raise ViewError(f"{path} must have a column `label` and columns of features; {_REMEDY}")
    if len(set(names)) < len(names):
        raise ViewError(f"{path} must have each column once; {_REMEDY}")
    return columns


def _read(path: Path, table: "pa.Table", columns: Mapping[str, Feature]) -> FeatureTable:
    import pyarrow as pa
    import pyarrow.compute as pc

    labels = _labels(path, table["label"])
    without = np.zeros(len(table), dtype=bool)
    if "problem" in table.column_names:
        without = pc.is_valid(table["problem"]).to_numpy(zero_copy_only=False)
    values = np.empty((len(table), len(columns)), dtype=np.float32)
    for i, name in enumerate(columns):
        values[:, i] = table[name].cast(pa.float32()).to_numpy(zero_copy_only=False)
    values[~np.isfinite(values)] = np.nan
    groups = None
    if "group" in table.column_names and table["group"].null_count < len(table):
        # A sample without a group is one of its own.
        given = table["group"].cast(pa.string()).to_pylist()
        groups = tuple(f"\0{i}" if group is None else group for i, group in enumerate(given))
    lengths = np.zeros((len(table), 2), dtype=np.int64)
    for i, name in enumerate(_LENGTHS):
        if name in table.column_names:
            lengths[:, i] = table[name].cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    ids = table["id"].cast(pa.string()).to_pylist() if "id" in table.column_names else range(len(table))
    whole = FeatureTable(
        path=path,
        origin=_origin(path, (table.schema.metadata or {}).get(_KEY)),
        ids=tuple(map(str, ids)),
        labels=labels,
        groups=groups,
        lengths=lengths,
        features=tuple(columns.values()),
        values=values,
        problems=int(without.sum()),
    )
    return whole.of(np.flatnonzero(~without))


def _labels(path: Path, column: Any) -> npt.NDArray[np.int8]:
    """Of a column that `extract` wrote, or that somebody wrote over it: true and false, or 1 and 0."""
    values = column.to_pylist()
    wrong = next((value for value in values if value is not None and value not in {0, 1}), None)
    if wrong is not None:
        raise ViewError(f"{path}: the column label must have true and false (1 and 0), got {str(wrong)[:80]!r}")
    return np.array([-1 if value is None else int(value) for value in values], dtype=np.int8)


def _origin(path: Path, encoded: bytes | None) -> TableOrigin | None:
    if encoded is None:  # a table that went through other hands
        return None
    names = list(TableOrigin.__dataclass_fields__)
    try:
        fields = JsonFields(parse_json(encoded), ["format", "version", *names])
        fields.choice("format", _FORMAT)
        fields.choice("version", _VERSION)
        return TableOrigin(**{name: fields.text(name) for name in names})
    except FieldError as error:
        raise ViewError(f"{path}: the metadata glassbox: {error}; {_REMEDY}") from None
