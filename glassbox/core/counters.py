"""The table of engine numbers: what glassbox counts and tells of an engine beside the statistics of attention.

Owns of each number its name, what it holds, its metric, how those of an engine's workers become one, and its place in
the page's answers. Workers, snapshot files, merging, metrics and page follow the table: a new counter is an entry here
and the line that counts it. The rules that `MergeRule` names are `store/merge.py`'s.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from numbers import Integral, Real
from typing import Any, Final, Literal

from glassbox.core.start_parts import START_PARTS

EngineValue = bool | int | float | Mapping[str, int] | Mapping[str, float] | Mapping[str, str]

# Why a layer is not observed: values of the label `reason` of layers_bypassed, and what each means.
BYPASS_REASONS: Final[Mapping[str, str]] = {
    "backend": "its attention backend is not one that glassbox wraps",
    "cache_layout": "its backend keeps the KV cache in a way that glassbox can't read",
    "cache_type": "its KV cache is of a type whose keys are no plain numbers",
    "compressed_latents": "it attends over compressed latent vectors that an indexer picks (DeepSeek V4)",
    "context_parallel": "context parallelism spreads the keys of a row over ranks",
    "cross": "cross attention, whose keys are those of the encoder",
    "encoder": "encoder attention sees the keys on both sides and keeps none",
    "internals": "its backend lacks something that earlier vLLM releases have",
    "kernel": "no kernel that measures it could be compiled for this GPU",
    "late_keys": "its backend writes keys only while it computes",
    "latent_window": "its latent attention has a sliding window, whose bounds can't be told",
    "mask": "its rows see other keys than a run that ends with their own",
    "micro_batching": "micro-batching splits a step's rows",
    "non_causal": "its rows of one step see each other whatever their order",
    "not_certified": "its output was not checked yet, or can't be",
    "not_reproduced": "its output is not what glassbox computes from what it reads",
    "packed_latents": "its latent cache packs scales and numbers of several types into the bytes of a token",
    "repeated": "it runs several times in a step, over the same cache",
    "sparse": "its attention is sparse: a row sees only the keys that an indexer picks",
}
# Why rows of a measured step are not in the histograms: values of the label `reason` of dropped_rows.
DROP_REASONS: Final[Mapping[str, str]] = {
    "draft": "draft tokens of speculative decoding, of which the step can't know whether they are kept",
    "mask": "prompt tokens that see keys behind their own (prefix language models, image tokens)",
    "max_rows_per_step": "there were more than `sampling.max_rows_per_step`; rows take turns",
}
# Of the checks of served outputs: values of the label `result` of canary_rows.
CANARY_RESULTS: Final = ("reproduced", "failed")


class MergeRule(Enum):
    """How the numbers of an engine's workers become one.

    A place is a pipeline stage and a tensor-parallel rank; a worker that was restarted stands at its predecessor's,
    and only the last one of a place is live.
    """

    SUM = auto()  # of all workers, each counts its own
    LARGEST_PLACE = auto()  # all places see the same: that of the place that saw most, its workers summed
    LARGEST_LIVE = auto()  # of the live workers
    SUM_OF_STAGES = auto()  # of the live workers: ranks see the same layers, stages different ones
    ALL_LIVE = auto()  # true if it is of all live workers
    NEWEST = auto()  # that of the worker whose snapshot is the newest


@dataclass(frozen=True)
class EngineNumber:
    """An entry of the table.

    Attributes:
        name: key in snapshot files and in the page's answers.
        metric: in Prometheus, without `glassbox_`; otel_name: in OpenTelemetry, without `glassbox.`.
        kind: a counter never falls; an info is a gauge that is always 1, with texts in its labels.
        unit: OpenTelemetry unit (UCUM).
        help: of the metric.
        merge: see MergeRule.
        holds: int, float or bool; with a label, of each of the label's values.
        labels: the metric's own. A counter or gauge has at most one, and is a mapping from that label's values; an info
            is a mapping from its labels to texts.
        values: of the label those that are known beforehand: they have series from the start, with 0, so that rates see
            the first increase and sums are never of nothing. A worker may leave them out, and may have others.
        page: place among the page's fields of an engine, ascending; None if it isn't shown there.
    """

    name: str
    metric: str
    otel_name: str
    kind: Literal["counter", "gauge", "info"]
    unit: str
    help: str
    merge: MergeRule
    holds: type[int] | type[float] | type[bool] = int
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    page: int | None = None

    def zero(self) -> Any:
        """Nothing counted yet: 0, or for a labelled one a `collections.Counter`."""
        return Counter(dict.fromkeys(self.values, 0)) if self.labels else self.holds()

    def accepts(self, value: object) -> bool:
        """Whether a value, of this process or of a file, has the kind that the entry says."""
        number = Integral if self.holds is int else Real
        if self.labels:
            inner = str if self.kind == "info" else number
            return isinstance(value, Mapping) and all(
                isinstance(key, str) and isinstance(part, inner) for key, part in value.items()
            )
        if self.holds is bool:
            return isinstance(value, bool)
        return isinstance(value, number)


# In the order of the metrics.
ENGINE_NUMBERS: Final[tuple[EngineNumber, ...]] = (
    EngineNumber(
        name="steps",
        metric="steps_total",
        otel_name="steps",
        kind="counter",
        unit="{step}",
        help="Engine steps seen.",
        merge=MergeRule.LARGEST_PLACE,
        page=3,
    ),
    EngineNumber(
        name="sampled_steps",
        metric="sampled_steps_total",
        otel_name="sampled_steps",
        kind="counter",
        unit="{step}",
        help="Engine steps of which rows were measured.",
        merge=MergeRule.LARGEST_PLACE,
        page=4,
    ),
    EngineNumber(
        name="dropped_rows",
        metric="dropped_rows_total",
        otel_name="dropped_rows",
        kind="counter",
        unit="{row}",
        help="Rows of measured steps that were left out of the histograms, by reason.",
        merge=MergeRule.SUM,
        labels=("reason",),
        page=5,
    ),
    EngineNumber(
        name="errors",
        metric="errors_total",
        otel_name="errors",
        kind="counter",
        unit="{error}",
        help="Errors of glassbox itself, by stage; serving is not affected.",
        merge=MergeRule.SUM,
        labels=("stage",),
        page=6,
    ),
    EngineNumber(
        name="overhead_seconds",
        metric="overhead_seconds_total",
        otel_name="overhead",
        kind="counter",
        unit="s",
        help="Time spent on measuring, of the slowest rank.",
        merge=MergeRule.LARGEST_PLACE,
        holds=float,
        page=7,
    ),
    EngineNumber(
        name="sample_rate",
        metric="sample_rate",
        otel_name="sample_rate",
        kind="gauge",
        unit="1",
        help="Share of engine steps in which a layer is measured, after the overhead budget.",
        merge=MergeRule.LARGEST_LIVE,
        holds=float,
        page=2,
    ),
    EngineNumber(
        name="layers_observed",
        metric="layers_observed",
        otel_name="layers_observed",
        kind="gauge",
        unit="{layer}",
        help="Layers of the model whose attention is observed.",
        merge=MergeRule.SUM_OF_STAGES,
    ),
    EngineNumber(
        name="layers_bypassed",
        metric="layers_bypassed",
        otel_name="layers_bypassed",
        kind="gauge",
        unit="{layer}",
        help="Layers of the model whose attention is not observed, by reason.",
        merge=MergeRule.SUM_OF_STAGES,
        labels=("reason",),
        values=tuple(BYPASS_REASONS),
        page=1,
    ),
    EngineNumber(
        name="canary_rows",
        metric="canary_rows_total",
        otel_name="canary_rows",
        kind="counter",
        unit="{row}",
        help="Rows whose served attention output was compared with a reference, by result.",
        merge=MergeRule.SUM,
        labels=("result",),
        values=CANARY_RESULTS,
        page=9,
    ),
    EngineNumber(
        name="traced_requests_active",
        metric="traced_requests_active",
        otel_name="traced_requests_active",
        kind="gauge",
        unit="{request}",
        help="Requests that are being traced.",
        merge=MergeRule.LARGEST_LIVE,
    ),
    EngineNumber(
        name="traced_requests",
        metric="traced_requests_total",
        otel_name="traced_requests",
        kind="counter",
        unit="{request}",
        help="Requests traced, because the client asked (opt_in) or by requests.trace_rate (sampled).",
        merge=MergeRule.LARGEST_PLACE,
        labels=("why",),
    ),
    EngineNumber(
        name="trace_refused",
        metric="trace_refused_total",
        otel_name="trace_refused",
        kind="counter",
        unit="{request}",
        help="Requests that were not traced, or not as they asked, by reason; they were served as any other.",
        merge=MergeRule.LARGEST_PLACE,
        labels=("reason",),
    ),
    EngineNumber(
        name="traces_dropped",
        metric="traces_dropped_total",
        otel_name="traces_dropped",
        kind="counter",
        unit="{file}",
        help="Files of traces removed because the file system of the run directory was full; metrics go first.",
        merge=MergeRule.SUM,
    ),
    EngineNumber(
        name="watched_delay_seconds",
        metric="watched_requests_delay_seconds",
        otel_name="watched_requests.delay",
        kind="gauge",
        unit="s",
        help="Seconds that running requests lag behind which rules of `actions` watch; 0 while none do.",
        merge=MergeRule.LARGEST_LIVE,
        holds=float,
    ),
    EngineNumber(
        name="trace_skipped_steps",
        metric="trace_skipped_steps_total",
        otel_name="trace_skipped_steps",
        kind="counter",
        unit="{step}",
        help="Steps whose rows traced requests lost, because overhead_budget was spent; their traces say truncated.",
        merge=MergeRule.LARGEST_PLACE,
    ),
    EngineNumber(
        name="start_seconds",
        metric="start_seconds",
        otel_name="start",
        kind="gauge",
        unit="s",
        help="Seconds that glassbox took of its workers' start, by part; of the slowest.",
        merge=MergeRule.LARGEST_LIVE,
        holds=float,
        labels=("part",),
        values=tuple(START_PARTS),
    ),
    EngineNumber(
        name="build",
        metric="build_info",
        otel_name="build_info",
        kind="info",
        unit="1",
        help="Always 1; the labels tell the versions and the observed attention backend.",
        merge=MergeRule.NEWEST,
        labels=("version", "vllm_version", "backend"),
        page=8,
    ),
    EngineNumber(
        name="reload_successful",
        metric="config_last_reload_successful",
        otel_name="config.last_reload_successful",
        kind="gauge",
        unit="1",
        help="1 if the last (re)load of the configuration file succeeded in all workers, else 0.",
        merge=MergeRule.ALL_LIVE,
        holds=bool,
    ),
    EngineNumber(
        name="reload_timestamp_s",
        metric="config_last_reload_timestamp_seconds",
        otel_name="config.last_reload_timestamp",
        kind="gauge",
        unit="s",
        help="Unix time of the last (re)load of the configuration file.",
        merge=MergeRule.LARGEST_LIVE,
        holds=float,
    ),
)
ENGINE_NUMBER: Final = {entry.name: entry for entry in ENGINE_NUMBERS}
