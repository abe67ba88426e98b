"""The table of a trace's arrays is the only place that lists them: one more row of it is an array everywhere."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from glassbox.config.load import GlassboxConfig
from glassbox.core import trace_arrays
from glassbox.core.rows import NUM_ROW_COLUMNS
from glassbox.core.trace_arrays import PLACE, TRACE_ARRAYS, TraceArray, without_values
from glassbox.core.trace_options import MAX_ATTENTION_KEYS
from glassbox.export.records import open_records
from glassbox.export.trace_document import Selection, document
from glassbox.export.trace_part import part_of
from glassbox.export.trace_tables import trace_tables
from glassbox.processes.worker.traces.active import ActiveTrace, Chunk
from glassbox.processes.worker.traces.traced_step import TracedRows, TracedStep
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_ranks import merge_ranks
from glassbox.store.trace_record import RequestTrace, Span, TraceOptions, read_trace, write_trace
from glassbox.web.request_routes import request_routes
from tests.trace_samples import make_host, make_trace

# One number of each row, layer and head that glassbox does not measure.
TILT = TraceArray(
    name="tilt",
    axes=PLACE,
    dtype="float32",
    merge="places",
    fill=math.nan,
    field="tilt",
    averaged=True,
    meaning="A test's.",
)
OPTIONS = TraceOptions(top_k=2, spans=(Span("a", 0, 1),), attention=True)
NUM_LAYERS, NUM_HEADS = 3, 2


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with one more array."""
    monkeypatch.setattr(trace_arrays, "TRACE_ARRAYS", (*TRACE_ARRAYS, TILT))


def active_trace(options: TraceOptions = OPTIONS, rank: int = 0) -> ActiveTrace:
    host = make_host(tuple(range(NUM_LAYERS)), NUM_HEADS, rank=rank, head_offset=rank * NUM_HEADS)
    return ActiveTrace(
        host, "cmpl-1-0-00000000", why="opt_in", options=options, traceparent=None, prompt_len=4,
        local_layers=tuple(range(NUM_LAYERS)), head_columns=tuple(range(NUM_HEADS)),
    )  # fmt: skip


def tilt_of(positions: tuple[int, ...], rank: int = 0) -> np.ndarray:
    """[T, L, H]; no two numbers alike."""
    layers, heads = np.ogrid[:NUM_LAYERS, :NUM_HEADS]
    return np.stack([100 * t + 10 * layers + heads + NUM_HEADS * rank for t in positions]).astype(np.float32)


def chunk(trace: ActiveTrace, *positions: int, rank: int = 0) -> Chunk:
    arrays = without_values({"token": len(positions), **trace.sizes})
    arrays["positions"][:] = positions
    arrays["tilt"][:] = tilt_of(positions, rank)
    whole = [np.full((NUM_LAYERS, NUM_HEADS, position + 1), 0.5, dtype=np.float16) for position in positions]
    return Chunk(arrays, tuple(whole) if trace.options.attention else ())


def recorded(rank: int = 0) -> RequestTrace:
    trace = active_trace(rank=rank)
    trace.append(chunk(trace, 2, 3, rank=rank))
    trace.append(chunk(trace, 4, rank=rank))
    return trace.record()


def get(run_dir: Path, **parameters: Any) -> Any:
    routes = request_routes(run_dir, lambda: GlassboxConfig.model_validate({}))
    answer = TestClient(Starlette(routes=routes)).get("/glassbox/v1/requests/cmpl-1-0", params=parameters)
    assert 200 == answer.status_code, answer.text
    return json.loads(answer.text, parse_constant=pytest.fail)


@pytest.mark.usefixtures("table")
class TestOneMoreArray:
    def test_in_an_active_trace(self) -> None:
        """Chunks are joined, position by position."""
        np.testing.assert_array_equal(tilt_of((2, 3, 4)), recorded().tilt)
        assert (0, NUM_LAYERS, NUM_HEADS) == active_trace().record().tilt.shape

    def test_its_bytes_are_reserved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each row takes so much more."""
        with_it = active_trace().row_nbytes(7)
        monkeypatch.setattr(trace_arrays, "TRACE_ARRAYS", TRACE_ARRAYS)
        assert active_trace().row_nbytes(7) + 4 * NUM_LAYERS * NUM_HEADS == with_it

    def test_nothing_measured_it(self) -> None:
        """A step gives its rows without a value."""
        trace = active_trace(TraceOptions())
        positions, phases = np.array([2, 3], dtype=np.int32), np.zeros(2, dtype=np.uint8)
        row_list = np.zeros((2, NUM_ROW_COLUMNS), dtype=np.int32)
        TracedStep([TracedRows(trace, 0, positions, phases)], row_list, np.arange(2), NUM_LAYERS, NUM_HEADS).commit()
        assert np.isnan(trace.record().tilt).all()
        assert (2, NUM_LAYERS, NUM_HEADS) == trace.record().tilt.shape

    def test_in_the_file(self, tmp_path: Path) -> None:
        """What was written is read, and an empty one keeps its type."""
        np.testing.assert_array_equal(tilt_of((2, 3, 4)), read_trace(write_trace(tmp_path, recorded())).tilt)
        empty = read_trace(write_trace(tmp_path, active_trace().record())).tilt
        assert ((0, NUM_LAYERS, NUM_HEADS), np.float32) == (empty.shape, empty.dtype)

    def test_in_the_merge_of_ranks(self) -> None:
        """Each rank's numbers stand at its heads."""
        merged = merge_ranks([recorded(rank=1), recorded()])
        both = [tilt_of((2, 3, 4), rank) for rank in (0, 1)]
        np.testing.assert_array_equal(np.concatenate(both, axis=2), merged.tilt)

    def test_over_http(self, tmp_path: Path) -> None:
        """Along the tokens its mean, and by layer and head where these are chosen."""
        write_trace(traces_path(tmp_path), recorded())
        shown = get(tmp_path, layers="2", heads="1,0")
        tilt = tilt_of((2, 3, 4))
        assert tilt.mean(axis=(1, 2)).tolist() == shown["tokens"]["tilt"]
        assert tilt[:, [2]][:, :, [1, 0]].tolist() == shown["detail"]["tilt"]

    def test_in_records_and_tables(self, tmp_path: Path) -> None:
        """A column of its own."""
        pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra `tables`")
        trace, tilt = recorded(), tilt_of((2, 3, 4))
        sink = open_records(tmp_path / "records", "parquet", 1)
        sink.write([document(trace)])
        sink.flush(force=True)
        assert [tilt.mean(axis=(1, 2)).tolist()] == pq.read_table(tmp_path / "records")["tokens_tilt"].to_pylist()
        tables = trace_tables([[trace]], "a test")
        assert tilt.ravel().tolist() == tables.rows["tilt"].to_pylist()
        assert tilt.mean(axis=(1, 2)).tolist() == tables.tokens["tilt"].to_pylist()

    def test_in_a_part(self) -> None:
        """That of the chosen layers and heads."""
        part, tilt = part_of(recorded(), Selection(layers=(2,), heads=(1, 0))), tilt_of((2, 3, 4))
        np.testing.assert_array_equal(tilt[:, [2]][:, :, [1, 0]], part.tilt)


class TestTable:
    def test_names(self) -> None:
        """Each stands once, and none hides another attribute of a trace."""
        names = [array.name for array in TRACE_ARRAYS]
        assert len(set(names)) == len(names)
        assert not [name for name in names if hasattr(RequestTrace, name)]

    def test_bytes_of_a_row(self) -> None:
        """As docs/requests.md says: by layer and head 44, 8 for each top position, 4 for each span, 2 for each key."""
        trace, places = active_trace(), NUM_LAYERS * NUM_HEADS
        by_place = 44 + 8 * OPTIONS.top_k + 4 * len(OPTIONS.spans) + 2 * 8
        assert places * by_place + 8 * OPTIONS.top_k + 4 + 1 == trace.row_nbytes(7)
        longest = trace.row_nbytes(MAX_ATTENTION_KEYS - 1)
        assert trace.row_nbytes(10 * MAX_ATTENTION_KEYS) == longest
        assert longest - trace.row_nbytes(0) == 2 * places * (MAX_ATTENTION_KEYS - 1)

    def test_what_is_held_is_what_is_counted(self) -> None:
        """Bytes of a chunk's rows are those that were reserved for them."""
        trace = active_trace()
        whole = [np.zeros((NUM_LAYERS, NUM_HEADS, position + 1), dtype=np.float16) for position in (2, 3)]
        arrays = without_values({"token": 2, **trace.sizes})
        held = sum(values.nbytes for values in (*arrays.values(), *whole))
        assert held == trace.row_nbytes(2) + trace.row_nbytes(3)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"phases": np.zeros(4, dtype=np.uint8)}, r"phases must have shape \[5\], got \[4\]"),
            ({"token_ids": np.zeros((2, 2), dtype=np.int32)}, r"token_ids must have shape \[None\], got \[2, 2\]"),
            ({"stats": make_trace().stats.astype(np.float64)}, "stats must have type float32, got float64"),
            ({"arrays": {"positions": np.zeros(0, dtype=np.int32)}}, "arrays must be those of the table"),
        ],
    )
    def test_a_trace_that_is_not_like_it(self, changes: dict[str, Any], message: str) -> None:
        """It is found when the trace is made, not by a reader."""
        with pytest.raises(ValueError, match=message):
            make_trace(**changes)

    def test_no_such_array(self) -> None:
        """The error says where they are listed."""
        with pytest.raises(
            AttributeError, match=r"a trace has no tilt; its arrays are listed in core/trace_arrays\.py"
        ):
            _ = make_trace().tilt
