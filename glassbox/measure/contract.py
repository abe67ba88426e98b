"""What the parts of measuring say to each other: the measurers' interface, and what is asked of a step's traced rows.

Owns types alone. `processes/worker/observer.py` calls a measurer, `processes/worker/traces/traced_step.py` asks and is
answered, and neither knows the other's insides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glassbox.core.accumulator_arrays import MeasuredArrays
from glassbox.core.rows import ROW_BATCH, ROW_QUERY
from glassbox.core.start_parts import StartParts
from glassbox.core.trace_options import MAX_ATTENTION_KEYS
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.probe_answers import ProbeAnswers, PromptAnswers, Questions
from glassbox.kernels.row_stats_cpu import KeyReader
from glassbox.kernels.row_stats_native import KeyPages
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.deferred import DeferredActions

# Up to here one launch for all layers is the faster way by 17 % and more (docs/data/few_rows_h200.csv).
FEW_ROWS: Final = 64


@dataclass(frozen=True, eq=False)
class MeasuredLayers:
    """What a measurer measures, on whatever device.

    Attributes:
        accumulators: [L, H] of the layers, on the device that they run on.
        local_layers: name of each layer -> its local layer, the index in the accumulators.
        sink_tokens, local_window: in tokens, see core/statistics.py.
    """

    accumulators: Accumulators
    local_layers: dict[str, int]
    sink_tokens: int
    local_window: int


@dataclass(frozen=True, eq=False)
class DeviceNeeds:
    """What measuring on a device that works by itself needs; on a CPU nothing of it.

    Attributes:
        max_rows: length of the row list; captured graphs hold it.
        head_size: largest of the layers; query_dtype: holds their queries, outputs, K and V, for those of traced and
            checked rows.
        num_kv_heads: largest local number of the layers.
        deferred: takes what waits for the device.
        is_piecewise: see `GraphNodes`.
        start: is told what graphs cost.
        activation_bytes: of the device's memory, that a forward pass takes at most beside weights and KV cache; 0 if it
            isn't known.
        few_rows: lists of at most so many rows, as far as their queries take little memory, are measured in one launch
            for all layers, after the forward pass, and longer ones in a launch of each layer (`kept_rows.py`). 0 is
            always the latter.
    """

    max_rows: int
    head_size: int
    num_kv_heads: int
    query_dtype: torch.dtype
    deferred: DeferredActions
    is_piecewise: Callable[[], bool]
    start: StartParts = field(default_factory=StartParts)
    activation_bytes: int = 0
    few_rows: int = FEW_ROWS


@dataclass(frozen=True)
class AskedRows:
    """What is asked of the probed rows of a step, R of them, over all of the worker's L layers at once.

    Attributes:
        rows: int32 [R, NUM_ROW_COLUMNS], their entries of the row list; places: int64 [R], where these stand in it.
        positions: int32 [R], in their sequences.
        top_k: the largest that one of them wants.
        spans: int32 [R, S, 2], (start, exclusive end); (0, 0) fills up.
        chosen: bool [R, L, H], the layers and heads that each of them wants.
        local_layers: layers that one of them wants.
        kept_attention: numbers of the rows whose whole attention is wanted, ascending.
        received: likewise of those whose attention is to be summed by position.
        queries: whether one of them wants queries and keys.
    """

    rows: npt.NDArray[np.int32]
    places: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int32]
    top_k: int
    spans: npt.NDArray[np.int32]
    chosen: npt.NDArray[np.bool_]
    local_layers: frozenset[int]
    kept_attention: tuple[int, ...]
    received: tuple[int, ...] = ()
    queries: bool = False

    def questions(self, local_layers: Sequence[int], num_heads: int) -> Questions[npt.NDArray]:
        """What is asked of these layers, which have so many heads."""
        return Questions(
            positions=self.positions.tolist(),
            top_k=self.top_k,
            spans=self.spans,
            chosen=self.chosen[:, local_layers, :num_heads],
            kept_attention=self.kept_attention,
            max_attention_keys=MAX_ATTENTION_KEYS,
            received=self.received,
            queries=self.queries,
        )


@dataclass(frozen=True, eq=False)
class AskedPrompt:
    """Consecutive rows of one request's prompt in a step, all of which are measured for its trace.

    They are no rows of the row list, so none of them enters an accumulator.

    Attributes:
        batch: its batch row.
        token: index of the first row among the step's tokens; num_rows: N.
        position: of the first row in its sequence. The keys up to the last row's own are in the cache.
        local_layers: in which they are measured.
        heads: query heads local to the worker, ascending; a layer that has fewer lacks the last.
        spans: int32 [S, 2], (start, exclusive end) of position ranges whose mass is wanted.
        grams: whether sums of q q^T and k k^T are wanted; kept: whether queries and keys are.
        keys_from: position of the first key that these want.
        squares: whether the squares of the attention that positions receive are wanted.
    """

    batch: int
    token: int
    num_rows: int
    position: int
    local_layers: frozenset[int]
    heads: tuple[int, ...]
    spans: npt.NDArray[np.int32]
    grams: bool
    kept: bool
    keys_from: int
    squares: bool = False

    @property
    def num_keys(self) -> int:
        """Up to the last row's own."""
        return self.position + self.num_rows


class LayeredRows(NamedTuple):
    """Rows of a step that are wanted in some layers.

    Attributes:
        local_layers: which.
        places: int64 [n], where the rows stand among the step's.
    """

    local_layers: frozenset[int]
    places: npt.NDArray[np.int64]


class StepTraces(Protocol):
    """Where what is measured of a step's traced rows goes.

    Attributes:
        num_slots: of a ring that has a slot for every row that ROW_SLOT gives one.
        local_layers: observed layers that some of the traces keep.
        wanted: which of the step's rows are to be measured in which of these.
        prompts: prompts of which all rows are measured. Answers go to `add_prompt`.
        prompt_rows: those of the step's rows that are these prompts', by layer. Nothing is kept of them themselves.
    """

    num_slots: int
    local_layers: frozenset[int]
    wanted: Sequence[LayeredRows]
    prompts: Sequence[AskedPrompt]
    prompt_rows: Sequence[LayeredRows]

    def add_stats(
        self,
        local_layers: Sequence[int],
        places: npt.NDArray[np.int64],
        stats: npt.NDArray[np.float32],
        previous_mass: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Keep the statistics of some layers.

        Args:
            local_layers: of the layers among the observed ones.
            places: [R], ascending, where the measured rows stand among the step's.
            stats: [N, R, H, NUM_STATISTICS + 1] of these layers and rows.
            previous_mass: [N, R, H], of the rows with a slot; None if it is not known.
        """

    def set_stats(
        self,
        local_layers: Sequence[int],
        ring: npt.NDArray[np.float32],
        previous_mass: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Keep the statistics of some layers, by slot.

        Args:
            local_layers: of the N layers among the observed ones.
            ring: [num_slots, N, H, NUM_STATISTICS + 1], NaN where nothing was measured.
            previous_mass: likewise [num_slots, N, H]; None if it is not known.
        """

    def add_prompt(self, number: int, local_layer: int, answers: PromptAnswers[npt.NDArray]) -> None:
        """Keep what was found of a prompt in one layer.

        Args:
            number: of the prompt among `prompts`.
            local_layer: which.
            answers: of those of its heads that the layer has.
        """

    def assemble_prompts(self) -> None:
        """Do of `commit` what takes long of whole prompts; on any thread, once `add_prompt` has had all answers."""

    def asked(self) -> AskedRows | None:
        """All questions together; None if there are none. Answers go to `add_answers`."""

    def add_answers(self, local_layers: Sequence[int], answers: ProbeAnswers[npt.NDArray]) -> None:
        """Keep what was found for `asked()` in some layers.

        Args:
            local_layers: which, ascending.
            answers: of all asked rows in these layers.
        """

    def commit(self) -> None:
        """Give every trace its rows."""


class CheckedLayers(NamedTuple):
    """What a check found in some layers.

    Attributes:
        local_layers: N of them.
        sums: float32 [C, N, H, len(OUTPUT_SUMS)] of the C checked rows.
        kv_sums: float32 [C, N, Hkv, len(KV_SUMS)]; None if the step's K and V were not given.
        head_size: of their K and V.
        roundoff: as `verdict.judge_layers` takes it.
    """

    local_layers: Sequence[int]
    sums: npt.NDArray[np.float32]
    kv_sums: npt.NDArray[np.float32] | None
    head_size: int
    roundoff: float


class StepLayers(NamedTuple):
    """The layers of a step.

    Attributes:
        sampled: local layers in which the sample's rows are measured.
        observed: all those of which numbers may be kept, the former among them.
    """

    sampled: frozenset[int]
    observed: frozenset[int]


class OutputCheck(Protocol):
    """Rows of a step whose output is to be reproduced, C of them, and where what is found of them goes.

    Attributes:
        places: int64 [C], where they stand in the row list; each has a slot.
        positions: int32 [C], in their sequences.
        local_layers: in which they are checked.
    """

    places: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int32]
    local_layers: frozenset[int]

    def add(self, found: CheckedLayers) -> None:
        """Keep what was found in some layers."""

    def commit(self) -> None:
        """That was all."""


class CheckLimits(NamedTuple):
    """What a check may cost at most.

    Attributes:
        rows: of a step.
        keys: that these rows see together; the first row is checked whatever it sees.
    """

    rows: int
    keys: int


# Kinds of queries, which take kernels of their own: those over the latent cache, and all others.
ABSORBED: Final = "absorbed"
PLAIN: Final = "plain"


class Forward(NamedTuple):
    """What an attention impl was given, and what it has answered; T tokens.

    Attributes:
        query: [T, Hq, D]; key, value: [T, Hkv, D] as computed, None if the impl reads them from the cache.
        output: [T', Hq, Dv], T' of them real; None if the impl returned something else.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    output: Tensor | None

    @property
    def kinds(self) -> frozenset[str]:
        """Of its queries."""
        return frozenset({PLAIN})


class LatentForward(NamedTuple):
    """What a layer with latent attention (MLA) was given, and what it has answered, of T tokens.

    K of a token is its latent vector and, after it, its rotary part, [Lkv + R] for all query heads; V is the latent
    vector alone. Of the first A tokens vLLM absorbs the queries, so that they attend over those. For the others it
    makes K and V of each head; absorbed, their queries give the same scores.

    Attributes:
        absorbed: queries of the first tokens, [A, Hq, Lkv] and [A, Hq, R]; None if there are none.
        output: of these, [A', Hq, Lkv], A' of them real, before it is projected to V of each head; None as `absorbed`.
        plain: queries of the others, [T - A, Hq, P + R]; None if there are none.
        absorb: gives some of these as `absorbed` has them.
        head_keys: gives K of some heads (int64 [h]) as vLLM makes it of cached vectors [n, Lkv + R], [h, n, P + R].
    """

    absorbed: tuple[Tensor, Tensor] | None
    output: Tensor | None
    plain: Tensor | None
    absorb: Callable[[Tensor], tuple[Tensor, Tensor]]
    head_keys: Callable[[Tensor, Tensor], Tensor]

    @property
    def kinds(self) -> frozenset[str]:
        """Of its queries."""
        parts = {ABSORBED: self.absorbed, PLAIN: self.plain}
        return frozenset(kind for kind, part in parts.items() if part is not None)

    @property
    def num_absorbed(self) -> int:
        """A."""
        return 0 if self.absorbed is None else len(self.absorbed[0])

    @property
    def query_dtype(self) -> torch.dtype:
        """Of the absorbed queries, which may be quantised where others are not; of the others if there are none."""
        parts = (*(self.absorbed or ()), self.plain)
        return next(part.dtype for part in parts if part is not None)

    def at(self, tokens: Tensor) -> Forward:
        """As the forward pass of a layer with one KV head of size Lkv + R, of which nothing but these tokens is set.

        Args:
            tokens: int64 [N], ascending.
        """
        first, rest = tokens[tokens < self.num_absorbed], tokens[tokens >= self.num_absorbed] - self.num_absorbed
        parts = []
        if self.absorbed is not None:
            parts.append((first, tuple(part[first] for part in self.absorbed)))
        if self.plain is not None:
            parts.append((rest + self.num_absorbed, self.absorb(self.plain[rest])))
        num_tokens = self.num_absorbed + (0 if self.plain is None else len(self.plain))
        latent, rotary = parts[0][1]
        # Memory that is never written is never there: of thousands of tokens a few are measured.
        query = latent.new_empty(num_tokens, latent.shape[1], latent.shape[2] + rotary.shape[2])
        for where, of_tokens in parts:
            query[where] = torch.cat(of_tokens, dim=-1)
        return Forward(query, None, None, self.output)


class BatchTables(NamedTuple):
    """Where a step's requests stand; B of them, on the worker's device.

    Attributes:
        block_table: int32 [B, max_blocks].
        query_start_loc: int32 [B + 1].
        seq_lens: int32 [B].
        group: one object for all layers of a KV-cache group in a step, which keeps these tensors alive.
    """

    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    group: object

    def positions(self, rows: Tensor) -> Tensor:
        """Batch row and position of rows, int32 [R, 2], as the device knows them.

        With asynchronous scheduling the host hears only later how many drafts of the step before were kept, and takes
        tokens after them to be further on.

        Args:
            rows: int32 [R, NUM_ROW_COLUMNS], on the same device.
        """
        batch = rows[:, ROW_BATCH]
        end = self.query_start_loc.index_select(0, batch + 1)
        # A draft that the runner has left out has no place.
        position = (self.seq_lens.index_select(0, batch) - end + rows[:, ROW_QUERY]).clamp(min=0)
        return torch.stack([batch, position], dim=1)


class LayerView(Protocol):
    """A layer as its measurer reads it.

    Attributes:
        name: vLLM's.
        params: what its scores depend on.
    """

    name: str
    params: LayerParams


class PackedLayer(LayerView, Protocol):
    """A layer whose keys lie packed in pages (CPU)."""

    def block_size(self, kv_cache: Tensor) -> int:
        """Tokens of a page."""

    def reader(self, kv_cache: Tensor) -> KeyReader:
        """Reads keys of `kv_cache`, of this layer; it must not outlive the step, for vLLM may free the cache."""

    def value_reader(self, kv_cache: Tensor) -> KeyReader:
        """Likewise reads values."""

    def pages(self, kv_cache: Tensor) -> KeyPages:
        """The pages for the native kernel."""


class StridedLayer(LayerView, Protocol):
    """A layer whose keys are a strided tensor (GPU).

    Attributes:
        num_heads, head_size, query_dtype: of its queries.
        gave_kv: whether its impl is given this step's K and V, in the model's type and of one head size.
        address: of its cache as it is now; vLLM may allocate it anew.
    """

    num_heads: int
    head_size: int
    query_dtype: torch.dtype
    gave_kv: bool

    @property
    def address(self) -> int: ...

    def keys(self, kv_cache: Tensor | None = None) -> Tensor:
        """K of the cache, [num_blocks, Hkv, block_size, D], in the type of its numbers.

        Args:
            kv_cache: the layer's; None takes it from the layer.
        """

    def values(self, kv_cache: Tensor | None = None) -> Tensor:
        """Likewise V."""


View_contra = TypeVar("View_contra", bound=LayerView, contravariant=True)


class Measurer(Protocol[View_contra]):
    """Measures the rows of a step on one kind of device.

    Attributes:
        max_rows: of a row list; max_traced_rows: of traced requests in it.
        num_slots: that rows of a list may take, those of traced requests and checked ones together.
        check_limits: of the rows that are checked.

    A step that is measured is `begin`, any number of `on_build` and `after_attention`, then `finish`; or `discard`,
    whatever came before, also a `begin` or `finish` that raised.
    """

    max_rows: int
    max_traced_rows: int
    num_slots: int
    check_limits: CheckLimits

    def is_warm(self, layer_name: str, kind: str) -> bool:
        """Whether no kernel is left to be compiled for a layer's queries of a kind (see `Forward.kinds`), because they
        came in warm-up."""

    def end_warm_up(self) -> frozenset[int]:
        """Warm-up and graph capture are over; what follows are real steps and dummies.

        Returns:
            Local layers that can't be measured: their kernel failed. To try again would cost each step what a compiler
            takes.
        """

    def begin(self, rows: np.ndarray, layers: StepLayers, traced: StepTraces | None, check: OutputCheck | None) -> None:
        """Measure `rows` ([R, NUM_ROW_COLUMNS] int32, see core/rows.py) during this step, each in its own layers.

        The sample's rows are measured and counted in `layers.sampled`. Rows of traced requests are measured in those
        layers that `traced.wanted` says, as far as they are among `layers.observed`, and go to `traced`; what is found
        of checked rows, in any layer, goes to `check`. Each is committed when that is complete.
        """

    def on_build(self, layer_names: Sequence[str], tables: BatchTables) -> None:
        """The attention metadata of these layers was built, from these tables."""

    def after_attention(
        self, layer: View_contra, forward: Forward | LatentForward, kv_cache: Tensor, tables: BatchTables | None
    ) -> None:
        """K of this step is in the cache, and the inner attention was computed (CPU) or queued (GPU).

        Args:
            layer: of it.
            forward: of the step.
            kv_cache: of the layer, not empty.
            tables: of the layer; None if only those of `on_build` are known.
        """

    def finish(self) -> None:
        """The step's forward pass is over (CPU) or queued (GPU)."""

    def discard(self) -> None:
        """Measure nothing more of this step and keep nothing of it; what was added already stays."""

    def enter_thread(self) -> None:
        """Another thread than that of the steps begins: it will call `copy`, and run what waits for the device."""

    def copy(self, now_s: float) -> MeasuredArrays:
        """The cumulative numbers; called from another thread."""
