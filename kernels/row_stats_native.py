"""Row statistics and probes of few rows on the CPU, by `row_stats.cpp`.

Owns the arguments of that kernel and the arrays that it fills: a layer's queries are taken right after its attention,
and the layers of a step are measured together. It runs on the calling thread alone and takes a half to a ninth of what
`row_stats_cpu.py` takes there (`python tests/bench/bench_row_stats_cpu.py`); that one is for workers with many cores,
for scores that don't fit the memory of one step, and where there is no compiler.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from glassbox.core.native import compile_cpp, load_cpp
from glassbox.core.rows import NUM_ROW_COLUMNS, ROW_COLUMNS, ROW_DECODE, ROW_SLOT
from glassbox.core.statistics import INDEX, NUM_STATISTICS
from glassbox.core.trace_arrays import trace_array
from glassbox.core.trace_options import MAX_TOP_K
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.probe_answers import ProbeAnswers, Questions

_SOURCE: Final = Path(__file__).with_name("row_stats.cpp")
# Of queries and keys; the kernel knows each by its number here.
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
# Multiplications of queries and keys in a layer, up to which one core is faster than torch's calls on many; up to so
# many cores it always is.
_LIGHT: Final = 1 << 21
FEW_CORES: Final = 4
# Float32 numbers: 16 MB.
_SCORE_BUDGET: Final = 1 << 22
# Likewise: the most queries that wait to be measured.
_QUERY_BUDGET: Final = 1 << 22
_POINTER, _INT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Rows(ctypes.Structure):
    """GlassboxRows of the C++ file; so are the next ones, field by field, which the compiler checks."""

    _fields_ = (
        *((name, _POINTER) for name in ("rows", "query_start", "seq_lens", "block_table", "asked")),
        *((name, _INT) for name in ("num_rows", "batch", "blocks", "block_size")),
        *((name, _INT) for name in ("reach", "sink_tokens", "local_window")),
    )


class _Sizes(ctypes.Structure):
    _fields_ = tuple((name, _INT) for name in ("scores", "item_scores"))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("pages", "order", "slopes", "sinks")),
        *((name, _INT) for name in ("query_type", "key_type", "page_stride", "head_stride", "num_pages")),
        *((name, _INT) for name in ("width", "run")),
        *((name, _INT) for name in ("heads", "kv_heads", "head_size")),
        ("scale", _REAL),
        ("soft_cap", _REAL),
    )


class _Asked(ctypes.Structure):
    _fields_ = (
        *((name, _INT) for name in ("layers", "top_k", "num_spans", "sum_keys")),
        *((name, _POINTER) for name in ("spans", "chosen", "topk_positions", "topk_mass", "span_mass", "chosen_sum")),
        *((name, _POINTER) for name in ("kept", "kept_keys", "received")),
    )


class _Tile(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("scores", "slopes", "sinks", "spans")),
        *((name, _POINTER) for name in ("stats", "previous", "span_mass", "received", "squares", "scratch")),
        *((name, _INT) for name in ("heads", "rows", "columns", "row_stride", "received_stride", "num_spans")),
        *((name, _INT) for name in ("position", "base", "reach", "sink_tokens", "local_window")),
        ("soft_cap", _REAL),
    )


class Sums(ctypes.Structure):
    """Statistics of rows, and the accumulators of a worker that the kernel adds them to; see the C++ file."""

    _fields_ = (
        *((name, _POINTER) for name in ("counts", "sums", "rows", "nonfinite", "maxima", "bounds")),
        *((name, _POINTER) for name in ("layers", "phase_of", "adapters", "stats")),
        *((name, _INT) for name in ("places", "adapter_heads", "phases", "buckets")),
        *((name, _INT) for name in ("num_layers", "num_rows", "heads")),
    )


_STRUCTS: Final[dict[str, type[ctypes.Structure]]] = {
    "GlassboxRows": _Rows,
    "GlassboxSizes": _Sizes,
    "GlassboxLayer": _Layer,
    "GlassboxAsked": _Asked,
    "GlassboxTile": _Tile,
    "GlassboxSums": Sums,
}


def _enumerators(values: Mapping[str, int]) -> str:
    return ",".join(f"{name.upper()}={value}" for name, value in values.items())


def _layout() -> str:
    """A check of each struct and field, for the C++ compiler."""
    kinds = {_POINTER: "is_pointer", _INT: "is_int", _REAL: "is_real"}
    checks = []
    for name, struct in _STRUCTS.items():
        checks.append(f"GLASSBOX_STRUCT({name},{ctypes.sizeof(struct)})")
        for field, kind, *_ in struct._fields_:
            checks.append(f"GLASSBOX_FIELD({name},{field},{getattr(struct, field).offset},{kinds[kind]})")
    return " ".join(checks)


def _definitions() -> dict[str, str]:
    """The macros of the C++ file, from the tables that Python has."""
    of_rows = {f"row_{name}": column for column, name in enumerate(ROW_COLUMNS)}
    of_rows |= {"num_row_columns": NUM_ROW_COLUMNS, "row_decode": ROW_DECODE}
    return {
        "GLASSBOX_ROW_COLUMNS": _enumerators(of_rows),
        "GLASSBOX_STATISTICS": _enumerators(INDEX | {"nonfinite": NUM_STATISTICS, "num_columns": NUM_STATISTICS + 1}),
        "GLASSBOX_TYPES": _enumerators({str(dtype).removeprefix("torch."): i for i, dtype in enumerate(_DTYPES)}),
        "GLASSBOX_MAX_TOP_K": str(MAX_TOP_K),
        "GLASSBOX_LAYOUT": _layout(),
    }


@dataclass(frozen=True)
class NativeKernel:
    """The compiled functions of the C++ file, `glassbox_` before each of their names."""

    sizes: Callable[..., int]
    take: Callable[..., None]
    row_stats: Callable[..., int]
    prompt_tile: Callable[..., None]
    add: Callable[..., None]


def compile_native_kernel() -> None:
    """Compile the functions, if that has not been done on a CPU like this one; they are not loaded.

    Raises:
        NativeError, OSError: see `compile_cpp`.
    """
    compile_cpp(_SOURCE, _definitions())


@functools.cache
def native_kernel() -> NativeKernel:
    """The functions, compiled when they are first asked for.

    Raises:
        NativeError: also if the structs of the C++ file are not those of this one.
        OSError: see `load_cpp`.
    """
    library = load_cpp(_SOURCE, _definitions())
    kernel = NativeKernel(
        library.glassbox_sizes,
        library.glassbox_take,
        library.glassbox_row_stats,
        library.glassbox_prompt_tile,
        library.glassbox_add,
    )
    library.glassbox_add.restype = None
    library.glassbox_add.argtypes = [_POINTER]
    library.glassbox_prompt_tile.restype = None
    library.glassbox_prompt_tile.argtypes = [_POINTER]
    library.glassbox_sizes.argtypes = [_POINTER] * 2
    library.glassbox_take.restype = None
    library.glassbox_take.argtypes = [_POINTER, _POINTER, _POINTER, _INT, _INT, _POINTER]
    library.glassbox_row_stats.argtypes = [_POINTER, _POINTER, _INT, *[_POINTER] * 6]
    return kernel


@dataclass(frozen=True, eq=False)
class KeyOrder:
    """How the keys of a head lie in a page, by runs of tokens.

    Attributes:
        begin: int32 [D / width, block_size / run], offset of each run.
        width: head dimensions that stand together for each token, 1 or 2.
        run: tokens.
    """

    begin: NDArray[np.int32]
    width: int
    run: int

    @classmethod
    def of(cls, offsets: NDArray[np.int64]) -> "KeyOrder | None":
        """The longest runs.

        Args:
            offsets: of each element in a page, [D, block_size].

        Returns:
            None if the elements stand in that very order.
        """
        head_size, block_size = offsets.shape
        if (offsets.ravel() == np.arange(offsets.size)).all():
            return None
        pairs = head_size % 2 == 0 and bool((offsets[1::2] - offsets[::2] == 1).all())
        width = 2 if pairs else 1
        whole = offsets[::width]
        run = next(
            run
            for run in range(block_size, 0, -1)
            if block_size % run == 0 and (np.diff(whole.reshape(len(whole), -1, run)) == width).all()
        )
        return cls(np.ascontiguousarray(whole[:, ::run], dtype=np.int32), width, run)


@dataclass(frozen=True, eq=False)
class KeyPages:
    """Keys of one layer as they lie in a paged cache.

    Attributes:
        dtype: of the stored numbers; an FP8 type may be stored as bytes.
        page_stride, head_stride: numbers from one page, and from one KV head within it, to the next.
        num_pages, num_kv_heads, block_size: of the cache; block_size in tokens.
        order: of a head's keys in a page; None if they lie as [D, block_size].
        scale: key = stored number * scale.
        address: of the cache, which must outlast the steps that measure it.
    """

    dtype: torch.dtype
    page_stride: int
    head_stride: int
    num_pages: int
    num_kv_heads: int
    block_size: int
    order: KeyOrder | None
    scale: float
    address: int


class NativeLayer:
    """What the kernel knows of a layer beside its rows.

    Args:
        params: of the layer.
        keys: of the layer.
        query_dtype, num_heads, head_size: of its queries.

    Attributes:
        address: of the kernel's argument.
    """

    def __init__(
        self, params: LayerParams, keys: KeyPages, query_dtype: torch.dtype, num_heads: int, head_size: int
    ) -> None:
        self.num_heads, self.head_size = num_heads, head_size
        slopes, sinks = (
            None if values is None else values.detach().float().numpy().copy()
            for values in (params.alibi_slopes, params.sinks)
        )
        begin, width, run = (None, 1, 1) if keys.order is None else (keys.order.begin, keys.order.width, keys.order.run)
        self._alive = (slopes, sinks, begin)
        self._struct = _Layer(
            pages=keys.address,
            order=_address(begin),
            width=width,
            run=run,
            slopes=_address(slopes),
            sinks=_address(sinks),
            query_type=_DTYPES.index(query_dtype),
            key_type=_DTYPES.index(keys.dtype),
            page_stride=keys.page_stride,
            head_stride=keys.head_stride,
            num_pages=keys.num_pages,
            heads=num_heads,
            kv_heads=keys.num_kv_heads,
            head_size=head_size,
            scale=params.scale * keys.scale,
            soft_cap=params.soft_cap or 0.0,
        )
        self.address: Final = ctypes.addressof(self._struct)


class NativeRows:
    """The rows of a step, for all layers with the same block table and reach.

    Args:
        rows, query_start_loc, seq_lens, block_table, block_size, reach, sink_tokens, local_window: see
            `plan_rows`.
        asked: which of the rows are probed, int64 [A], in the order of the answers.

    Raises:
        ValueError: a row is no token of its request.
    """

    def __init__(
        self,
        rows: NDArray[np.int32],
        query_start_loc: ArrayLike,
        seq_lens: ArrayLike,
        block_table: ArrayLike,
        block_size: int,
        *,
        reach: int | None,
        sink_tokens: int,
        local_window: int,
        asked: NDArray[np.int64] | None = None,
    ) -> None:
        arrays = [rows, query_start_loc, seq_lens, block_table]
        listed, starts, lens, table = (np.ascontiguousarray(array, dtype=np.int32) for array in arrays)
        # Layers are measured when the step is over, and a drafter may have counted on by then.
        starts, lens = starts.copy(), lens.copy()
        places = None
        if asked is not None:
            places = np.full(len(rows), -1, dtype=np.int64)
            places[asked] = np.arange(len(asked))
        self._alive = (listed, starts, lens, table, places)
        self._struct = _Rows(
            rows=listed.ctypes.data,
            query_start=starts.ctypes.data,
            seq_lens=lens.ctypes.data,
            block_table=table.ctypes.data,
            asked=_address(places),
            num_rows=len(listed),
            batch=len(lens),
            blocks=table.shape[1],
            block_size=block_size,
            reach=reach or 0,
            sink_tokens=sink_tokens,
            local_window=local_window,
        )
        self.num_rows, self.block_size = len(listed), block_size
        self.has_slots = bool((listed[:, ROW_SLOT] >= 0).any())
        self.address: Final = ctypes.addressof(self._struct)
        self._sizes = _Sizes()
        if native_kernel().sizes(self.address, ctypes.addressof(self._sizes)):
            raise ValueError("every row must be a token of its request, got a query index outside of its batch row")

    def is_light(self, num_heads: int, head_size: int, cores: int) -> bool:
        """Whether the kernel is the faster way in a layer of that size, on a worker with so many cores."""
        if self._sizes.item_scores * num_heads > _SCORE_BUDGET:
            return False
        return cores <= FEW_CORES or self._sizes.scores * num_heads * head_size <= _LIGHT

    def scratch(self, num_heads: int, head_size: int) -> NDArray[np.float32]:
        """As the kernel needs it for layers of that size."""
        return np.empty(head_size * self.block_size + num_heads * self._sizes.item_scores, dtype=np.float32)


class NativeProbe:
    """Answers of the probed rows in some layers, as the kernel fills them in.

    Args:
        asked: of these layers.

    Attributes:
        address: of the kernel's argument.

    Raises:
        ValueError: more top positions are asked for than the kernel has room for.
    """

    def __init__(self, asked: Questions[NDArray]) -> None:
        if asked.top_k > MAX_TOP_K:
            raise ValueError(f"top_k must be at most {MAX_TOP_K}, got {asked.top_k}; ask for fewer positions")
        num_rows, num_layers, num_heads = asked.chosen.shape
        self._spans = np.ascontiguousarray(asked.spans, dtype=np.int32)
        self._chosen = np.ascontiguousarray(asked.chosen, dtype=np.uint8)
        sizes = {"token": num_rows, "layer": num_layers, "head": num_heads, "top_k": asked.top_k}
        sizes["span"] = self._spans.shape[1]
        self._topk_positions, self._topk_mass, self._span_mass = (
            trace_array(name).filled(sizes) for name in ("topk_positions", "topk_mass", "span_mass")
        )
        self._sum = np.zeros((num_rows, asked.longest))
        kept = list(asked.kept_attention)
        self._kept_keys = np.zeros(num_rows, dtype=np.int64)
        self._kept_keys[kept] = [min(asked.positions[row] + 1, asked.max_attention_keys) for row in kept]
        self._kept = [np.zeros((num_layers, num_heads, self._kept_keys[row]), dtype=np.float32) for row in kept]
        self._kept_at = np.zeros(num_rows, dtype=np.uint64)
        self._kept_at[kept] = [values.ctypes.data for values in self._kept]
        wanted = list(asked.received)
        self._received = [
            np.zeros((num_layers, num_heads, asked.positions[row] + 1), dtype=np.float32) for row in wanted
        ]
        self._received_at = np.zeros(num_rows, dtype=np.uint64)
        self._received_at[wanted] = [values.ctypes.data for values in self._received]
        self._struct = _Asked(
            layers=num_layers,
            top_k=asked.top_k,
            num_spans=self._spans.shape[1],
            sum_keys=self._sum.shape[1],
            spans=self._spans.ctypes.data,
            chosen=self._chosen.ctypes.data,
            topk_positions=self._topk_positions.ctypes.data,
            topk_mass=self._topk_mass.ctypes.data,
            span_mass=self._span_mass.ctypes.data,
            chosen_sum=self._sum.ctypes.data,
            kept=self._kept_at.ctypes.data,
            kept_keys=self._kept_keys.ctypes.data,
            received=self._received_at.ctypes.data,
        )
        self.address: Final = ctypes.addressof(self._struct)

    def answers(self, layers: Sequence[int]) -> ProbeAnswers[NDArray]:
        """What was found in those of the layers that were measured; `chosen_sum` is over all of them."""
        chosen = list(layers)
        return ProbeAnswers(
            topk_positions=self._topk_positions[:, chosen],
            topk_mass=self._topk_mass[:, chosen],
            span_mass=self._span_mass[:, chosen],
            chosen_sum=self._sum.astype(np.float32),
            attention=tuple(values[chosen].astype(np.float16) for values in self._kept),
            received=tuple(values[chosen] for values in self._received),
        )


class NativeStep:
    """Statistics of a step's rows in layers of one size.

    Args:
        rows: of the step.
        num_layers: room for so many.
        num_heads, head_size: query heads of each, and their size.
        probe: of layers whose rows are probed, too.

    Attributes:
        measured: names of the layers that are, in the order of `stats`.
    """

    def __init__(
        self, rows: NativeRows, num_layers: int, num_heads: int, head_size: int, probe: NativeProbe | None = None
    ) -> None:
        kernel = native_kernel()
        self._take, self._row_stats = kernel.take, kernel.row_stats
        self._rows, self._rows_address, self._probe = rows, rows.address, probe
        self._stats = np.empty((num_layers, rows.num_rows, num_heads, NUM_STATISTICS + 1), dtype=np.float32)
        # Of rows with a slot alone.
        shape = self._stats.shape[:3]
        self._previous = np.full(shape, np.nan, dtype=np.float32) if rows.has_slots else None
        of_layer = rows.num_rows * num_heads * head_size
        self._queries = np.empty((min(num_layers, max(_QUERY_BUDGET // max(of_layer, 1), 1)), of_layer), np.float32)
        self._scratch = rows.scratch(num_heads, head_size)
        # Looked up once: `ndarray.ctypes` makes an object.
        self._queries_address, self._layer_bytes = self._queries.ctypes.data, self._queries.strides[0]
        self._waiting: list[tuple[int, NativeLayer, int]] = []
        self.measured: list[int] = []

    def take(self, name: int, layer: NativeLayer, query: Tensor, place: int = -1) -> None:
        """Take a layer's queries, and measure those that wait if there is no room for more.

        Args:
            name: of the layer in `measured`.
            layer: of this step's size.
            query: [T, Hq, D] of the step, on the CPU; the last dimension contiguous.
            place: of the layer in the probe, -1 if it isn't probed.

        Raises:
            ValueError: see `measure`.
        """
        to = self._queries_address + len(self._waiting) * self._layer_bytes
        of_token, of_head, _ = query.stride()
        self._take(self._rows_address, layer.address, query.data_ptr(), of_token, of_head, to)
        self._waiting.append((name, layer, place))
        if len(self._waiting) == len(self._queries):
            self.measure()

    def measure(self) -> None:
        """Measure the layers that wait; their keys must be in the cache still.

        Raises:
            ValueError: the block table names a block that a cache doesn't have, or there are more layers than room;
                those that wait are left out.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        if len(self.measured) + len(waiting) > len(self._stats):
            raise ValueError(f"a step has room for {len(self._stats)} layers, got more; one was taken twice")
        layers = np.array([layer.address for _, layer, _ in waiting], dtype=np.uint64)
        places = np.array([place for _, _, place in waiting], dtype=np.int64)
        if self._row_stats(
            self._rows_address,
            layers.ctypes.data,
            len(waiting),
            self._queries_address,
            None if self._probe is None else self._probe.address,
            places.ctypes.data,
            self._stats[len(self.measured) :].ctypes.data,
            None if self._previous is None else self._previous[len(self.measured) :].ctypes.data,
            self._scratch.ctypes.data,
        ):
            raise ValueError("a block table must name blocks of its cache, got one beyond; see vLLM's metadata")
        self.measured += [name for name, _, _ in waiting]

    def stats(self) -> NDArray[np.float32]:
        """float32 [measured layers, R, Hq, NUM_STATISTICS + 1] as `row_stats_cpu` returns them."""
        return self._stats[: len(self.measured)]

    def previous(self) -> NDArray[np.float32] | None:
        """float32 [measured layers, R, Hq], attention to the position before, as `row_stats_cpu` returns it."""
        return None if self._previous is None else self._previous[: len(self.measured)]


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTile:
    """Consecutive rows of one request's prompt in heads that share a KV head, and where their numbers go.

    Attributes:
        scores: float32 [G, M, n] contiguous, raw; overwritten.
        position: of the first row; base: of the first of the n keys, the first that this row sees.
        slopes, sinks: float32 [G], of ALiBi and learned sinks; None is none.
        soft_cap, reach: as of `LayerParams`.
        spans: int32 [S, 2] contiguous.
        stats, previous, span_mass: float32 [M, G, ...], of larger arrays whose rows have one stride in heads.
        received: float64 [G, n], likewise; added to. squares: likewise, or None, those of attention to earlier keys.
        sink_tokens, local_window: in tokens.
    """

    scores: NDArray[np.float32]
    position: int
    base: int
    slopes: NDArray[np.float32] | None
    sinks: NDArray[np.float32] | None
    soft_cap: float | None
    reach: int | None
    spans: NDArray[np.int32]
    stats: NDArray[np.float32]
    previous: NDArray[np.float32]
    span_mass: NDArray[np.float32]
    received: NDArray[np.float64]
    squares: NDArray[np.float64] | None
    sink_tokens: int
    local_window: int

    def measure(self) -> None:
        """Fill them in, on the calling thread."""
        heads, rows, columns = self.scores.shape
        scratch = np.empty(2 * columns, dtype=np.float32)
        tile = _Tile(
            scores=self.scores.ctypes.data,
            slopes=_address(self.slopes),
            sinks=_address(self.sinks),
            spans=self.spans.ctypes.data,
            stats=self.stats.ctypes.data,
            previous=self.previous.ctypes.data,
            span_mass=self.span_mass.ctypes.data,
            received=self.received.ctypes.data,
            squares=_address(self.squares),
            scratch=scratch.ctypes.data,
            heads=heads,
            rows=rows,
            columns=columns,
            row_stride=self.previous.strides[0] // self.previous.itemsize,
            received_stride=self.received.strides[0] // self.received.itemsize,
            num_spans=len(self.spans),
            position=self.position,
            base=self.base,
            reach=self.reach or 0,
            sink_tokens=self.sink_tokens,
            local_window=self.local_window,
            soft_cap=self.soft_cap or 0.0,
        )
        native_kernel().prompt_tile(ctypes.addressof(tile))


def _address(values: NDArray | None) -> int | None:
    return None if values is None else values.ctypes.data
