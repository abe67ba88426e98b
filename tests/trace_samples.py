"""Traces for tests: consistent in themselves, every number different from its neighbours."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from glassbox.adapter.scheduler import ScheduledStep
from glassbox.core.signal_table import NUM_SINGULAR_VALUES, ON_REQUEST
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.core.trace_arrays import SCORE_PARAMS, not_asked_for, trace_array, without_values
from glassbox.processes.worker.traces.active import TraceHost
from glassbox.store.trace_record import RequestTrace, Span, TraceOptions, joined_attention, no_attention


@dataclass
class Continued:
    """What glassbox reads of vLLM's CachedRequestData."""

    req_ids: list[str] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_output_tokens: list[int] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)


@dataclass
class Scheduled:
    """What glassbox reads of vLLM's SchedulerOutput."""

    scheduled_new_reqs: list[Any] = field(default_factory=list)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    finished_req_ids: set[str] = field(default_factory=set)
    scheduled_cached_reqs: Continued = field(default_factory=Continued)
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


def scheduled_step(*args: Any, **fields: Any) -> ScheduledStep:
    """What the adapter makes of a SchedulerOutput with these fields."""
    return ScheduledStep(Scheduled(*args, **fields))


def new_request(
    req_id: str,
    prompt_len: int,
    extra_args: dict[str, Any] | None = None,
    prefill_token_ids: list[int] | None = None,
    num_computed_tokens: int = 0,
    adapter: str | None = None,
) -> Any:
    """What glassbox reads of vLLM's NewRequestData."""
    return SimpleNamespace(
        req_id=req_id,
        prompt_len=prompt_len,
        sampling_params=SimpleNamespace(extra_args=extra_args),
        prefill_token_ids=prefill_token_ids,
        num_computed_tokens=num_computed_tokens,
        lora_request=None if adapter is None else SimpleNamespace(lora_name=adapter),
    )


def make_host(layers: tuple[int, ...] = (0, 1), num_heads: int = 2, **changes: Any) -> TraceHost:
    """A worker with all heads of its model."""
    fields: dict[str, Any] = {
        "engine": "0",
        "rank": 0,
        "model_name": "tiny/model",
        "instance": "i0",
        "layers": layers,
        "head_offset": 0,
        "num_heads": num_heads,
        "num_heads_total": num_heads,
        "max_model_len": 1000,
    }
    return TraceHost(**{**fields, **changes})


def make_trace(
    *,
    seed: int = 0,
    request_id: str = "cmpl-1-0",
    prompt_len: int = 6,
    positions: tuple[int, ...] = (2, 5, 6, 7, 8),
    layers: tuple[int, ...] = (0, 3),
    heads: tuple[int, ...] = (0, 1, 2),
    top_k: int = 2,
    spans: tuple[Span, ...] = (Span("system", 0, 3), Span("user", 3, 6)),
    attention: bool = True,
    **changes: Any,
) -> RequestTrace:
    """A trace of random attention; everything but `stats` is computed from it, in numpy."""
    rng = np.random.default_rng(seed)
    place = (len(layers), len(heads))
    weights = [rng.dirichlet(np.ones(position + 1), size=place) for position in positions]
    k = max(top_k, 0)
    topk_positions = np.full((len(positions), *place, k), -1, dtype=np.int32)
    topk_mass = np.zeros((len(positions), *place, k), dtype=np.float32)
    mean_positions = np.full((len(positions), k), -1, dtype=np.int32)
    mean_mass = np.zeros((len(positions), k), dtype=np.float32)
    span_mass = np.zeros((len(positions), *place, len(spans)), dtype=np.float32)
    for t, p in enumerate(weights):
        best = np.argsort(-p, axis=-1)[..., :k]
        topk_positions[t, ..., : best.shape[-1]] = best
        topk_mass[t, ..., : best.shape[-1]] = np.take_along_axis(p, best, axis=-1)
        mean = p.mean(axis=(0, 1))
        best = np.argsort(-mean)[:k]
        mean_positions[t, : len(best)], mean_mass[t, : len(best)] = best, mean[best]
        for s, span in enumerate(spans):
            span_mass[t, ..., s] = p[..., span.start : span.end].sum(-1)
    starts = np.zeros(len(positions), dtype=np.int32)
    kept = joined_attention([p.astype(np.float16) for p in weights], starts) if attention else no_attention()
    stats = rng.random((len(positions), *place, NUM_STATISTICS + 1)).astype(np.float32)
    stats[..., NUM_STATISTICS] = 0
    fields: dict[str, Any] = {
        "request_id": request_id,
        "internal_id": f"{request_id}-{seed:08x}",
        "engine": "0",
        "rank": 0,
        "model_name": "tiny/model",
        "instance": "i0",
        "requested_model": "tiny",
        "adapter": "poet",
        "client": None,
        "why": "opt_in",
        "status": "finished",
        "start_time_s": 1_700_000_000.5 + seed,
        "end_time_s": 1_700_000_002.5 + seed,
        "prompt_len": prompt_len,
        "num_generated": 4,
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "layers": layers,
        "heads": heads,
        "span_names": tuple(span.name for span in spans),
        "options": TraceOptions(top_k=top_k, spans=spans, attention=attention),
        "truncated": False,
    }
    sizes = {"token": len(positions), "layer": len(layers), "head": len(heads), "top_k": k, "span": len(spans)}
    arrays: dict[str, Any] = {
        **without_values(sizes),
        **not_asked_for({"layer": len(layers), "head": len(heads)}),
        **kept,
        "positions": np.array(positions, dtype=np.int32),
        "phases": (np.array(positions) >= prompt_len).astype(np.uint8),
        "stats": stats,
        "topk_positions": topk_positions,
        "topk_mass": topk_mass,
        "mean_topk_positions": mean_positions,
        "mean_topk_mass": mean_mass,
        "span_ranges": np.array([(span.start, span.end) for span in spans], dtype=np.int32).reshape(-1, 2),
        "span_mass": span_mass,
        "token_ids": np.arange(prompt_len + 4, dtype=np.int32),
    }
    arrays |= {name: changes.pop(name) for name in list(changes) if name in arrays}
    return RequestTrace(**{**fields, "arrays": arrays, **changes})


def with_arrays(trace: RequestTrace, **arrays: Any) -> RequestTrace:
    """The trace with other arrays of these names."""
    return replace(trace, arrays={**trace.arrays, **arrays})


def with_arrays_of_signals(trace: RequestTrace, *, dim: int = 4, seed: int = 0) -> RequestTrace:
    """The trace with random numbers in the arrays that are kept on request alone, heads of size `dim`."""
    rng = np.random.default_rng(seed)
    sizes = {**trace.sizes, "singular": NUM_SINGULAR_VALUES, "dim": dim}
    sizes |= dict.fromkeys(("position", "squared_position"), int(trace.positions[-1]) + 1)
    sizes |= {"param": len(SCORE_PARAMS), "generated": trace.num_generated}
    arrays = {name: trace_array(name).filled(sizes) for name in ON_REQUEST}
    arrays["logprobs"] = np.zeros(trace.num_generated, dtype=np.float32)
    return with_arrays(trace, **{name: rng.random(values.shape, np.float32) for name, values in arrays.items()})
