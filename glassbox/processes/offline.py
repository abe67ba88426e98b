"""Attention of requests that run offline, in `vllm.LLM`, as tables.

Owns `glassbox.capture`. It asks for traces as any client does, and reads the files that the workers leave in the run
directory, so it works with the engine in this process and in another one, and with several ranks. pyarrow is the
extra `tables`.
"""

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from glassbox.adapter.offline_engine import (
    Answered,
    OfflineEngine,
    OfflineParams,
    RequestOutput,
    default_params,
    deliver_ends,
    generate,
    num_answers,
    with_options,
)
from glassbox.config.load import GlassboxConfig, find_config, load_config
from glassbox.core.counters import BYPASS_REASONS
from glassbox.core.trace_options import (
    PROMPT_KEY,
    ROWS_KEY,
    TOP_K_KEY,
    Span,
    parse_options,
    traced_with,
)
from glassbox.export.trace_tables import TraceTables, pyarrow, trace_tables
from glassbox.store import rundir
from glassbox.store.merge import merge
from glassbox.store.snapshot import read_snapshots
from glassbox.store.trace_directory import TraceDirectory
from glassbox.store.trace_record import RequestTrace

if TYPE_CHECKING:
    import pyarrow as pa

_USER: Final = "glassbox.capture"
_POLL_S: Final = 0.05
_SAMPLE: Final = re.compile(r"(\d+)_")
Spans = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Capture(TraceTables):
    """What `capture` returns. In each table `request` is the prompt's index and `sample` the answer's (n > 1).

    Attributes:
        outputs: of vLLM, in the order of the prompts.
        traces: of each prompt, one per answer.
        requests: request, sample, request_id, status, truncated, prompt_len, num_generated, text.
    """

    outputs: list[RequestOutput]
    traces: list[list[RequestTrace]]
    requests: "pa.Table"


def capture(
    llm: OfflineEngine,
    prompts: Sequence[Any],
    sampling_params: OfflineParams | Sequence[OfflineParams] | None = None,
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    top_k: int = 0,
    spans: Spans | Sequence[Spans] = (),
    rows: bool = False,
    prompt: Literal["sampled", "all", "new"] = "sampled",
    signals: Iterable[str] = (),
    timeout_s: float = 60.0,
) -> Capture:
    """Generate answers with `vllm.LLM.generate`, and return them with their attention as pyarrow tables.

    Args:
        llm: a vllm.LLM, made after glassbox was installed.
        prompts: as for `LLM.generate`.
        sampling_params: one, or one per prompt; None is the model's default.
        layers, heads: global indices; None is all that are measured.
        top_k: most attended positions per row, layer and head, at most 32; 0 is none.
        spans: names of token ranges (start, exclusive end); one mapping for all prompts, or one per prompt.
        rows: whether the attention to every position is wanted.
        prompt: rows of the prompt: those that the sampler takes, all (what the prefix cache has is computed again), or
            all new ones (what it has is missing).
        signals: names of the table of signals; what they need is kept. Some need, and get, the whole prompt.
        timeout_s: how long to wait for the traces after the answers are there.

    Raises:
        ValueError: an option breaks its rule (OptionError), or a list has not the prompts' length.
        ImportError: pyarrow is missing.
        RuntimeError: no attention of the model is observed, or traces are missing; the message says what to look at.
    """
    pyarrow(_USER)
    see_that_it_is_observed()
    prompts = list(prompts)
    params = _params(llm, prompts, sampling_params)
    per_prompt = _per_prompt("spans", spans, len(prompts))
    more = _signal_options(prompt, signals)
    asked = [
        with_options(one, _options(layers, heads, top_k, of_prompt, rows) | more)
        for one, of_prompt in zip(params, per_prompt, strict=True)
    ]
    answered, traces = traced(llm, prompts, asked, timeout_s=timeout_s)
    outputs = [one.output for one in answered]
    tables = trace_tables(traces, _USER)
    return Capture(outputs=outputs, traces=traces, requests=_requests_table(answered, traces), **vars(tables))


def traced(
    llm: OfflineEngine, prompts: Sequence[Any], asked: Sequence[OfflineParams], *, timeout_s: float = 60.0
) -> tuple[list[Answered], list[list[RequestTrace]]]:
    """Generate answers, and wait for their traces.

    Args:
        llm: a vllm.LLM, made after glassbox was installed.
        prompts: as for `LLM.generate`.
        asked: parameters of each prompt, with the options by which it asks for its trace.
        timeout_s: how long to wait for the traces after the answers are there.

    Returns:
        Answers and traces of each prompt; of these one per answer.

    Raises:
        RuntimeError: traces are missing; the message says what to look at.
    """
    config = load_config(find_config())
    # More than max_active at once would be refused.
    batch = max(1, config.requests.max_active // max([1, *(num_answers(one) for one in asked)]))
    answered: list[Answered] = []
    traces: list[list[RequestTrace]] = []
    for start in range(0, len(prompts), batch):
        since_s = time.time()
        done = generate(llm, prompts[start : start + batch], asked[start : start + batch])
        answered += done
        traces += _wait(llm, done, since_s, timeout_s, config)
    return answered, traces


def see_that_it_is_observed() -> None:
    """Before a model is asked.

    Raises:
        RuntimeError: no attention of it is observed; the message says why.
    """
    engines = merge(read_snapshots(rundir.run_dir()))
    if engines and not any(engine.layers for engine in engines):
        found = Counter[str]()
        for engine in engines:
            found.update(cast(Mapping[str, int], engine.numbers["layers_bypassed"]))
        why = "; ".join(f"{reason}: {BYPASS_REASONS.get(reason, reason)}" for reason in sorted(+found))
        raise RuntimeError(
            f"no attention layer of {engines[0].model_name} is observed ({why or 'it has none'}), so there is nothing "
            "to capture; the worker's log names the layers, docs/models.md what is observed"
        )


def _params(
    llm: OfflineEngine, prompts: list[Any], given: OfflineParams | Sequence[OfflineParams] | None
) -> list[OfflineParams]:
    given = default_params(llm) if given is None else given
    return _per_prompt("sampling_params", given, len(prompts))


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one for all or one per prompt, got {len(value)} for {count} prompts")
    return list(value)


def _options(
    layers: Iterable[int] | None, heads: Iterable[int] | None, top_k: int, spans: Spans, rows: bool
) -> dict[str, Any]:
    places = [Span(name, start, end) for name, (start, end) in spans.items()] if spans else ()
    options = {**traced_with(layers, heads, places), TOP_K_KEY: top_k, ROWS_KEY: rows}
    parse_options(options)
    return options


def _signal_options(prompt: str, signals: Iterable[str]) -> dict[str, Any]:
    options = traced_with(signals=signals) | ({} if prompt == "sampled" else {PROMPT_KEY: prompt})
    parse_options(options)
    return options


def _wait(
    llm: OfflineEngine, answered: list[Answered], since_s: float, timeout_s: float, config: GlassboxConfig
) -> list[list[RequestTrace]]:
    """The traces of each output, once they have ended and lie in the run directory."""
    deliver_ends(llm)
    directory = TraceDirectory(rundir.run_dir())
    wanted = {one.request_id: len(one.texts) for one in answered}
    deadline = time.monotonic() + timeout_s
    while True:
        ended = [s for s in directory.summaries() if s.status != "active" and s.start_time_s >= since_s]
        missing = [i for i, n in wanted.items() if sum(s.request_id == i for s in ended) < n]
        if not missing:
            break
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{len(missing)} of {len(wanted)} requests left no trace in {directory.path} within {timeout_s:g} s; "
                f"see glassbox's log for refusals. Requests can't be traced with requests.opt_in: false, nor where "
                f"requests.keep ({config.requests.keep}) or keep_mb ({config.requests.keep_mb}) is too small"
            )
        time.sleep(_POLL_S)
    found = {s.internal_id for s in ended}
    return [
        sorted((t for t in directory.traces(one.request_id) if t.internal_id in found), key=_sample) for one in answered
    ]


def _sample(trace: RequestTrace) -> int:
    """Number of the answer: vLLM writes it before the ids of a request with n > 1."""
    match = _SAMPLE.match(trace.internal_id)
    return int(match[1]) if match and trace.internal_id != trace.request_id else 0


def _requests_table(answered: list[Answered], traces: list[list[RequestTrace]]) -> "pa.Table":
    rows = [
        {
            "request": i,
            "sample": sample,
            "request_id": trace.request_id,
            "status": trace.status,
            "truncated": trace.truncated,
            "prompt_len": trace.prompt_len,
            "num_generated": trace.num_generated,
            "text": one.texts[sample] if sample < len(one.texts) else None,
        }
        for i, (one, of_prompt) in enumerate(zip(answered, traces, strict=True))
        for sample, trace in enumerate(of_prompt)
    ]
    return pyarrow(_USER).Table.from_pylist(rows)
