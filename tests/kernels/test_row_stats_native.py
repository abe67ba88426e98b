"""What the native kernel alone has to do: pages in any order and dtype, and what it refuses."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from glassbox.core import native
from glassbox.core.native import NativeError
from glassbox.core.rows import NUM_ROW_COLUMNS, ROW_BATCH, ROW_COLUMNS, ROW_QUERY
from glassbox.core.statistics import INDEX, NUM_STATISTICS
from glassbox.core.trace_options import MAX_TOP_K
from glassbox.kernels import row_stats_native
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.probe_answers import Questions
from glassbox.kernels.row_stats_native import (
    KeyOrder,
    KeyPages,
    NativeLayer,
    NativeProbe,
    NativeRows,
    NativeStep,
    native_kernel,
)
from tests.kernels.row_lists import entry
from tests.kernels.test_row_stats_cpu import Batch

BLOCK, D = 32, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
BATCH = Batch(
    [(150, 1, 100), (70, 5, 90), (33, 33, 33)],
    [(0, 0), (1, 0), (1, 4), (2, 0), (2, 31), (2, 32)],
    num_heads=8,
    num_kv_heads=2,
    block_size=BLOCK,
    head_size=D,
)


def offsets(name: str) -> np.ndarray:
    """[D, BLOCK], where a page has each key element."""
    t, d = np.arange(BLOCK), np.arange(D)[:, None]
    return {
        "dimensions": d * BLOCK + t,
        "tokens": t * D + d,
        # vLLM's, tests/integration/test_cpu_cache.py
        "amx": t // 16 * 1024 + t % 16 * 2 + d // 2 * 32 + d % 2,
        "halves": t // 16 * 16 * D + d * 16 + t % 16,
        "random": np.random.default_rng(5).permutation(D * BLOCK).reshape(D, BLOCK),
    }[name]


def measure(batch: Batch, key_dtype: torch.dtype, order: str, scale: float = 1.0) -> torch.Tensor:
    """Statistics of a batch whose keys lie in that order; its keys become what the dtype holds of them."""
    batch.keys = [keys.to(key_dtype).to(torch.float32) for keys in batch.keys]
    pages, table = batch.cache()
    lying = torch.empty(*pages.shape[:2], D * BLOCK)
    lying[..., torch.from_numpy(offsets(order)).flatten()] = pages.transpose(2, 3).flatten(2)
    stored = lying.to(key_dtype)
    keys = KeyPages(
        dtype=key_dtype,
        page_stride=stored.stride(0),
        head_stride=stored.stride(1),
        num_pages=len(stored),
        num_kv_heads=batch.num_kv_heads,
        block_size=BLOCK,
        order=KeyOrder.of(offsets(order)),
        scale=scale,
        address=stored.data_ptr(),
    )
    batch.keys = [keys_of * scale for keys_of in batch.keys]
    layer = NativeLayer(batch.params, keys, batch.q.dtype, num_heads=batch.num_heads, head_size=D)
    step = NativeStep(batch.native_rows(table), 1, batch.num_heads, D)
    step.take(0, layer, batch.q)
    return torch.from_numpy(step.stats()[0])


class TestPages:
    @pytest.mark.parametrize("order", ["dimensions", "tokens", "amx", "halves", "random"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_any_order_and_dtype(self, dtype: torch.dtype, order: str) -> None:
        """The statistics are those of the keys, however these lie and are stored."""
        batch = replace(BATCH)
        batch.check_statistics(measure(batch, dtype, order))

    def test_orders(self) -> None:
        """The longest runs are found: none needed, pairs of dimensions, tokens in halves, single elements."""
        assert KeyOrder.of(offsets("dimensions")) is None
        found = {name: KeyOrder.of(offsets(name)) for name in ("amx", "halves", "tokens", "random")}
        assert {name: (order.width, order.run) for name, order in found.items() if order} == {
            "amx": (2, 16),
            "halves": (1, 16),
            "tokens": (2, 1),
            "random": (1, 1),
        }

    def test_key_scale(self) -> None:
        """Keys are the stored numbers times the scale."""
        batch = replace(BATCH)
        batch.check_statistics(measure(batch, torch.float8_e4m3fn, "dimensions", scale=0.37))

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_every_number(self, dtype: torch.dtype) -> None:
        """Each bit pattern is read as torch reads it: subnormals, infinities, NaN."""
        bits = 8 * dtype.itemsize
        patterns = torch.arange(2**bits, dtype=torch.int32).to({8: torch.uint8, 16: torch.int16}[bits])
        numbers = patterns.view(dtype).float()
        n = len(numbers)
        # Requests of one block; a row of one key each, so its score is that key.
        blocks = n // 16
        rows = np.zeros((n, NUM_ROW_COLUMNS), dtype=np.int32)
        rows[:, ROW_QUERY], rows[:, ROW_BATCH] = np.arange(n), np.arange(n) // 16
        native = NativeRows(
            rows, np.arange(0, n + 1, 16), np.full(blocks, 16), np.arange(blocks)[:, None], 16,
            reach=1, sink_tokens=4, local_window=8,
        )  # fmt: skip
        keys = KeyPages(dtype, 16, 16, blocks, 1, 16, None, 1.0, patterns.data_ptr())
        layer = NativeLayer(LayerParams(scale=1.0), keys, torch.float32, num_heads=1, head_size=1)
        step = NativeStep(native, 1, 1, 1)
        step.take(0, layer, torch.ones(n, 1, 1))
        (got,) = step.stats()
        finite = numbers.isfinite() & (numbers.abs() < 2.0**126)
        assert torch.equal(torch.from_numpy(got[:, 0, NUM_STATISTICS]), (~finite).float())
        assert torch.equal(torch.from_numpy(got[:, 0, INDEX["max_logit"]])[finite], numbers[finite])


class TestRows:
    def test_rows_of_padded_queries(self) -> None:
        """Queries may lie with gaps between them, as a view of the projection of q, k and v."""
        batch = replace(BATCH)
        expected = batch.check_statistics(measure(batch, torch.float32, "dimensions"))
        whole = torch.randn(len(batch.q), 3 * batch.num_heads, D)
        whole[:, : batch.num_heads] = batch.q
        batch.q = whole[:, : batch.num_heads]
        assert not batch.q.is_contiguous()
        np.testing.assert_array_equal(measure(batch, torch.float32, "dimensions"), expected)

    def test_a_row_outside_of_its_request_is_an_error(self) -> None:
        """As for torch."""
        with pytest.raises(ValueError, match="every row must be a token of its request"):
            NativeRows(
                np.array([entry(7, 0, 0, 5)], dtype=np.int32), [0, 5], [5], [[0]], 16,
                reach=None, sink_tokens=4, local_window=8,
            )  # fmt: skip

    def test_a_block_beyond_the_cache_is_an_error(self) -> None:
        """Nothing is read outside of the cache."""
        batch = replace(BATCH)
        pages, table = batch.cache()
        layer, _lying = batch.native_layer(pages, transposed=True, num_pages=int(table[0, 0]))
        step = NativeStep(batch.native_rows(table), 1, batch.num_heads, D)
        with pytest.raises(ValueError, match="must name blocks of its cache"):
            step.take(0, layer, batch.q)
        assert not len(step.stats())

    def test_more_layers_than_room_are_an_error(self) -> None:
        """Nothing is written beyond the statistics, and those that are there stay."""
        batch = replace(BATCH)
        pages, table = batch.cache()
        layer, _lying = batch.native_layer(pages, transposed=True)
        step = NativeStep(batch.native_rows(table), 1, batch.num_heads, D)
        step.take(7, layer, batch.q)
        with pytest.raises(ValueError, match="has room for 1 layers"):
            step.take(8, layer, batch.q)
        assert step.measured == [7]
        batch.check_statistics(torch.from_numpy(step.stats()[0]))

    def test_which_steps_are_light(self) -> None:
        """On few cores all of them, but for scores beyond 16 MB; on many the small ones."""

        def rows(num_keys: int) -> NativeRows:
            return NativeRows(
                np.array([entry(0, 0, num_keys - 1, 5)], dtype=np.int32), [0, 1], [num_keys],
                np.zeros((1, num_keys // 16 + 1)), 16,
                reach=None, sink_tokens=4, local_window=8,
            )  # fmt: skip

        assert rows(100_000).is_light(32, 128, cores=4)
        assert not rows(200_000).is_light(32, 128, cores=4)
        assert not rows(100_000).is_light(32, 128, cores=5)
        assert rows(300).is_light(32, 128, cores=64)


@pytest.fixture(scope="class")
def _cheap_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """It hardly optimises, and for no CPU in particular: a quarter of the time, and numbers that are alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_FLAGS", ("-O1", *native._FLAGS[1:]))
        patch.setattr(native, "_TARGETS", ((),))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class TestTables:
    """Columns, numbers of types and structs are those of Python, whatever they are."""

    @pytest.fixture
    def compile_again(self, _cheap_compiler: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
        """Has the kernel compiled from the tables as they are now; what was compiled before is back afterwards."""

        def again() -> None:
            kernel = native_kernel.__wrapped__()
            monkeypatch.setattr(row_stats_native, "native_kernel", lambda: kernel)

        return again

    def test_statistics_follow_the_table(
        self, compile_again: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With two statistics in each other's place, their numbers are, too."""
        compile_again()
        expected = measure(replace(BATCH), torch.float32, "dimensions")
        order = list(INDEX)
        order[1], order[6] = order[6], order[1]
        monkeypatch.setattr(row_stats_native, "INDEX", {name: column for column, name in enumerate(order)})
        compile_again()
        got = measure(replace(BATCH), torch.float32, "dimensions")
        assert not got.equal(expected)
        torch.testing.assert_close(got[..., [0, 6, 2, 3, 4, 5, 1, 7, 8, 9]], expected, rtol=0, atol=0, equal_nan=True)

    def test_a_statistic_that_the_kernel_lacks_has_no_value(
        self, compile_again: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """NaN, not what the memory held; all others are as they were."""
        compile_again()
        expected = measure(replace(BATCH), torch.float32, "dimensions")
        monkeypatch.setattr(row_stats_native, "INDEX", INDEX | {"novel": NUM_STATISTICS})
        monkeypatch.setattr(row_stats_native, "NUM_STATISTICS", NUM_STATISTICS + 1)
        compile_again()
        got = measure(replace(BATCH), torch.float32, "dimensions")
        assert got[..., NUM_STATISTICS].isnan().all()
        kept = [*range(NUM_STATISTICS), NUM_STATISTICS + 1]
        torch.testing.assert_close(got[..., kept], expected, rtol=0, atol=0, equal_nan=True)

    def test_a_statistic_of_another_name_is_an_error(
        self, compile_again: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the kernel computes must be in the table."""
        renamed = {name.replace("max_logit", "largest"): column for name, column in INDEX.items()}
        monkeypatch.setattr(row_stats_native, "INDEX", renamed)
        with pytest.raises(NativeError, match=r"can't compile row_stats.cpp: .*MAX_LOGIT"):
            compile_again()

    def test_row_columns_follow_the_table(
        self, compile_again: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the row list's columns the other way round, the same rows have the same numbers."""
        compile_again()
        expected = measure(replace(BATCH), torch.float32, "dimensions")
        monkeypatch.setattr(row_stats_native, "ROW_COLUMNS", ROW_COLUMNS[::-1])
        compile_again()
        turned = BATCH.row_list[:, ::-1]
        monkeypatch.setattr(Batch, "row_list", turned)
        got = measure(replace(BATCH), torch.float32, "dimensions")
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)

    def test_types_follow_the_list(self, compile_again: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
        """Types of queries and keys have no numbers of their own in the kernel."""
        monkeypatch.setattr(row_stats_native, "_DTYPES", row_stats_native._DTYPES[::-1])
        compile_again()
        for dtype in DTYPES:
            batch = replace(BATCH)
            batch.check_statistics(measure(batch, dtype, "tokens"))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (lambda fields: (fields[1], fields[0], *fields[2:]), r"GlassboxSizes\.item_scores must stand where"),
            (lambda fields: fields[:1], "GlassboxSizes must have the fields that row_stats_native.py gives it"),
            (lambda fields: (*fields, ("more", ctypes.c_int64)), "GlassboxSizes must have the fields that"),
            (lambda fields: (fields[0], ("other", ctypes.c_int64)), "other"),
            (
                lambda fields: (fields[0], (fields[1][0], ctypes.c_double)),
                r"GlassboxSizes\.item_scores must stand where",
            ),
        ],
        ids=["swapped", "fewer", "more", "renamed", "of another type"],
    )
    def test_structs_that_differ_are_an_error(
        self,
        fields: Callable[[tuple], tuple],
        message: str,
        compile_again: Callable[[], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The kernel doesn't compile, and the message names struct and field."""
        changed = type("_Sizes", (ctypes.Structure,), {"_fields_": fields(row_stats_native._Sizes._fields_)})
        monkeypatch.setitem(row_stats_native._STRUCTS, "GlassboxSizes", changed)
        with pytest.raises(NativeError, match=f"can't compile row_stats.cpp: .*{message}"):
            compile_again()

    def test_more_top_positions_than_the_kernel_has_room_for(self) -> None:
        """They are refused, not left out."""
        asked = Questions([0], MAX_TOP_K + 1, np.zeros((1, 0, 2)), np.ones((1, 1, 1), dtype=bool), (), 1)
        with pytest.raises(ValueError, match=f"top_k must be at most {MAX_TOP_K}, got {MAX_TOP_K + 1}; ask for fewer"):
            NativeProbe(asked)
