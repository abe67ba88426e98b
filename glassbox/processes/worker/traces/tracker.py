"""Which request a row belongs to, and which requests are traced.

Owns the life of a request as a worker sees it: it arrives with a scheduler output, may be preempted and resumed,
reordered within the batch, and is gone when a later output says so. Everything is keyed by vLLM's internal id, which
the runner gives for each batch row, so no place in a batch is ever remembered. It costs a few look-ups per step while
nothing is traced, and never fails a request: one that can't be traced is counted, and served as any other.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from glassbox.adapter.protocols import Runner
from glassbox.adapter.row_mask import RowMask
from glassbox.adapter.runner import Batch, RequestTokens, copy_tokens, request_tokens, until_end, was_aborted
from glassbox.adapter.scheduler import Arrival, ScheduledStep
from glassbox.config.load import GlassboxConfig, PerClientConfig
from glassbox.core.logs import get_logger, log_once
from glassbox.core.rows import ROW_BATCH, ROW_DECODE, ROW_PHASE, ROW_QUERY, ROW_SLOT
from glassbox.core.signal_table import MAX_KEPT_PLACES, MAX_KEPT_TOKENS
from glassbox.core.trace_options import (
    BEAM_PROMPT_KEY,
    CHOICE_KEY,
    CLIENT_KEY,
    RESPOND_KEY,
    ClientChoice,
    OptionError,
    TraceOptions,
    parse_options,
)
from glassbox.measure.contract import AskedPrompt, LayeredRows
from glassbox.measure.deferred import DeferredActions
from glassbox.measure.sampling import is_sampled_request
from glassbox.processes.worker.traces.active import TOO_LONG_FOR_KEYS, ActiveTrace, TraceHost
from glassbox.processes.worker.traces.quota import RowQuota
from glassbox.processes.worker.traces.sums import MAX_GRAM_HEAD_SIZE
from glassbox.processes.worker.traces.traced_step import TracedPrompt, TracedRows, TracedStep
from glassbox.store.file_names import request_digest
from glassbox.store.trace_record import Why, external_id
from glassbox.store.trace_refusals import Refusal

logger = get_logger(__name__)

Reason = Literal[
    "bad_options",
    "budget",
    "client_max_active",
    "client_rows",
    "disabled",
    "max_active",
    "max_prompt_rows",
    "memory",
    "not_observed",
    "opt_in_off",
    "positions",
    "prompt_memory",
    "signals",
]
REFUSAL_REASONS: Final[dict[Reason, str]] = {
    "bad_options": "its options are not understood, or name no layer or head that is measured",
    "budget": "traced requests have spent sampling.overhead_budget",
    "client_max_active": "requests.per_client.max_active requests of its client are traced already",
    "client_rows": "its client has used up requests.per_client.rows_per_second",
    "disabled": "glassbox is switched off (enabled: false)",
    "max_active": "requests.max_active requests are traced already",
    "max_prompt_rows": "its prompt has more tokens than requests.max_prompt_rows",
    "memory": "traced requests have used up requests.max_active_mb",
    "not_observed": "the attention of this model is not observed",
    "opt_in_off": "clients may not ask for traces (requests.opt_in: false)",
    "positions": "with speculative decoding and asynchronous scheduling the positions of its tokens are known on the "
    "device alone; start vLLM with --no-async-scheduling",
    "prompt_memory": "all rows of its prompt need more memory than requests.max_trace_mb or max_active_mb leave",
    "signals": "what its signals need is beyond a bound",
}
WHYS: Final[tuple[Why, ...]] = ("opt_in", "sampled")
_MB: Final = 1_000_000


def row_positions(batch: Batch, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Position of each row of a row list in its request's sequence, int32 [R]."""
    of = rows[:, ROW_BATCH]
    positions = batch.num_computed[of] + rows[:, ROW_QUERY] - batch.query_start[of]
    return np.asarray(positions, dtype=np.int32)


class RequestTracker:
    """The requests of one worker that are traced, or kept out of all statistics.

    All methods but `active`, `ended`, `release` and `counts` belong to the step thread.

    Args:
        host: the worker.
        deferred: where what was measured waits for the device, and so the end of a trace, too.
        clock: seconds, monotonic.
        on_awaited: told that a request is gone whose answer waits for its trace.
        on_refused: told that such a request is gone which was not traced.
        sampled: returns what is kept of a request that the trace rate chooses.
    """

    def __init__(
        self,
        host: TraceHost,
        deferred: DeferredActions,
        clock: Callable[[], float] = time.monotonic,
        on_awaited: Callable[[], None] = lambda: None,
        on_refused: Callable[[Refusal], None] = lambda _: None,
        sampled: Callable[[], TraceOptions] = TraceOptions,
    ) -> None:
        self._sampled = sampled
        self._host, self._deferred, self._on_awaited = host, deferred, on_awaited
        self._on_refused = on_refused
        self._active: dict[str, ActiveTrace] = {}
        self._ended: list[ActiveTrace] = []
        # Requests without statistics, and refused ones: the V2 runner brings a preempted request as a new one.
        self._off: set[str] = set()
        self._refused: dict[str, Refusal | None] = {}
        self._refusals: Counter[Reason] = Counter()
        self._traced: Counter[Why] = Counter()
        self._config: GlassboxConfig | None = None
        self._quota = RowQuota(clock)
        self._spent = False
        # Bytes that the traces of the step that is under way may still take.
        self._step_room = 0

    def begin_step(
        self,
        runner: Runner,
        step: ScheduledStep,
        config: GlassboxConfig,
        local_layers: frozenset[int],
        *,
        spent: bool = False,
    ) -> bool:
        """Hear of a step: who is gone, who is new.

        Args:
            runner: vLLM's, before it has seen the step.
            step: as the scheduler wants it; one without tokens tells who is gone, too.
            config: in force.
            local_layers: observed layers that are measured now.
            spent: no further trace may begin, since those there are have spent the budget.

        Returns:
            Whether the step has rows of traced requests.
        """
        self._config, self._spent = config, spent
        self._deferred.run()
        # Before the new ones: an id may be gone and come again in the same step.
        if self._active or self._off or self._refused:
            for req_id in step.finished:
                self._finish(runner, req_id)
        if any(trace.has_drafts for trace in self._active.values()):
            self._verify(step)
        for new in step.arrivals():
            if new.extra_args or config.requests.trace_rate:
                self._arrive(new, config, local_layers)
        if not self._active or not config.enabled:
            return False
        scheduled = step.scheduled
        return any(req_id in scheduled for req_id, trace in self._active.items() if not trace.truncated)

    def skip(self, step: ScheduledStep) -> None:
        """The rows of traced requests in this step are not measured."""
        for req_id, trace in self._active.items():
            if req_id in step.scheduled:
                trace.skip()

    def marks(self, req_ids: tuple[str, ...]) -> tuple[npt.NDArray[np.bool_] | None, npt.NDArray[np.bool_] | None]:
        """Which requests of a batch are traced and which have no statistics, bool [B] each; None is none."""
        traced = excluded = None
        if self._active and self._config is not None and self._config.enabled:
            active = self._active
            traced = np.array([req_id in active and not active[req_id].truncated for req_id in req_ids], dtype=bool)
        if self._off:
            excluded = np.array([req_id in self._off for req_id in req_ids], dtype=bool)
        return traced, excluded

    def trace_rows(
        self,
        runner: Runner,
        batch: Batch,
        rows: npt.NDArray[np.int32],
        num_drafts: npt.NDArray[np.int64],
        new_from: npt.ArrayLike = 0,
        mask: RowMask | None = None,
    ) -> TracedStep | None:
        """Where the traced rows of a row list, and of whole prompts, go; None if there are none, or no memory for any.

        Args:
            runner: vLLM's.
            batch: of the step.
            rows: int32 [R, NUM_ROW_COLUMNS].
            num_drafts: [B] draft tokens, the last ones of each request in the step.
            new_from: [B] position before which tokens are computed again.
            mask: of the step, None if all rows are causal.
        """
        if self._config is None:
            return None
        self._step_room = self._room()  # once: to sum over all traces for each of them would grow with their square
        prompts = self._prompts(runner, batch, np.maximum(batch.num_computed, new_from), mask)
        indices = np.flatnonzero(rows[:, ROW_SLOT] >= 0)
        if not indices.size and not prompts:
            return None
        of = rows[indices, ROW_BATCH]
        positions = row_positions(batch, rows[indices])
        phases = (rows[indices, ROW_PHASE] & ROW_DECODE).astype(np.uint8)
        members, kept, of_prompts, first = [], [indices[:0]], [], 0
        # Rows are ascending in their queries, so those of a request stand together.
        for begin, end in _runs(of):
            req_id, row = batch.req_ids[of[begin]], of[begin]
            trace, start = self._active[req_id], begin
            if trace.prompt != "sampled" and not (trace.options.top_k or trace.options.attention):
                # All rows of its prompt are measured, and these are asked nothing more.
                start += int((phases[begin:end] == 0).sum())
            if start > begin:
                of_prompts.append(LayeredRows(frozenset(trace.local_layers), indices[begin:start]))
            if trace.truncated or start == end or not self._take(runner, req_id, positions[start:end].tolist()):
                continue
            trace.prompt_len = int(batch.prompt_len[row])
            drafts = None
            if num_drafts[row]:
                drafts = trace.propose(int(batch.num_computed[row] + batch.num_scheduled[row] - num_drafts[row]))
            members.append(TracedRows(trace, first, positions[start:end], phases[start:end], drafts))
            kept.append(indices[start:end])
            first += end - start
        if not members and not prompts:
            return None
        host = self._host
        return TracedStep(members, rows, np.concatenate(kept), len(host.layers), host.num_heads, prompts, of_prompts)

    def _take(self, runner: Runner, req_id: str, positions: Sequence[int], *, whole: bool = False) -> bool:
        """Whether a trace may have rows at these positions; if not, it has none from now on."""
        assert self._config is not None
        trace, requests = self._active[req_id], self._config.requests
        if not self._quota.take(trace.client, len(positions), requests.per_client.rows_per_second):
            trace.truncate("requests.per_client.rows_per_second left out later rows")
            return False
        before = trace.nbytes
        if not trace.reserve(positions, min(requests.max_trace_mb * _MB, before + self._step_room), whole=whole):
            return False
        self._step_room -= trace.nbytes - before
        if requests.include_text:
            trace.tokens = request_tokens(runner, req_id)
        return True

    def _prompts(
        self, runner: Runner, batch: Batch, new_from: npt.NDArray[np.int64], mask: RowMask | None
    ) -> list[TracedPrompt]:
        """The prompts of the step of which all rows are wanted; `new_from` is [B], the first that is new of each."""
        if all(trace.prompt == "sampled" for trace in self._active.values()):
            return []
        found = []
        for row, req_id in enumerate(batch.req_ids):
            trace = self._active.get(req_id)
            if trace is None or trace.prompt == "sampled" or trace.truncated:
                continue
            computed, prompt_len = int(batch.num_computed[row]), int(batch.prompt_len[row])
            first = max(int(new_from[row]), trace.prompt_to)
            end = min(computed + int(batch.num_scheduled[row]), prompt_len)
            if first >= end:
                continue
            trace.prompt_len = prompt_len
            if not trace.prompt_to and first and not trace.thinned:
                trace.note(f"the prompt's first {first} positions came from the prefix cache, so they have no rows")
            positions = np.arange(first, end)
            if mask is not None and mask.sees_others(np.full(len(positions), row), positions).any():
                trace.truncate("tokens of the prompt see others behind them, which is not measured")
                continue
            if not self._take(runner, req_id, positions.tolist(), whole=True):
                continue
            # Now, for on a GPU the next chunk comes before this one's numbers do.
            trace.prompt_to = end
            sums = trace.sums
            keys_from = sums.keys_to if sums is not None else end
            if sums is not None:
                sums.keys_to = end
            asked = AskedPrompt(
                batch=row,
                token=int(batch.query_start[row]) + first - computed,
                num_rows=end - first,
                position=first,
                local_layers=frozenset(trace.local_layers),
                heads=trace.head_columns,
                spans=np.array([(span.start, span.end) for span in trace.options.spans], dtype=np.int32).reshape(-1, 2),
                grams=sums is not None and sums.sizes.grams,
                kept=sums is not None and sums.sizes.kept,
                keys_from=keys_from,
                squares=sums is not None and sums.sizes.squares,
            )
            found.append(TracedPrompt(trace, asked))
        return found

    def close(self) -> None:
        """The worker ends: what still runs is lost."""
        for req_id in list(self._active):
            self._deferred.add(partial(self._end, self._active.pop(req_id), "lost"))

    def active(self) -> list[ActiveTrace]:
        """Traces of requests that run."""
        return list(self._active.values())

    def ended(self) -> list[ActiveTrace]:
        """Traces of requests that are gone, until they are released."""
        return list(self._ended)

    def release(self, trace: ActiveTrace) -> None:
        """Forget a trace that `ended` gave."""
        self._ended.remove(trace)

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Refused requests by reason and traced ones by why, since the start; those that never happened are 0."""
        refused: dict[str, int] = {reason: self._refusals[reason] for reason in REFUSAL_REASONS}
        return refused, {why: self._traced[why] for why in WHYS}

    def _verify(self, step: ScheduledStep) -> None:
        """What became of the drafts of the step before."""
        active = self._active
        for request in step.continued():
            if request.req_id in active:
                active[request.req_id].verify(request.num_generated)
        for new in step.arrivals():
            if new.req_id in active:
                active[new.req_id].verify(new.known_len - new.prompt_len)

    def _arrive(self, new: Arrival, config: GlassboxConfig, local_layers: frozenset[int]) -> None:
        req_id = new.req_id
        if req_id in self._active or req_id in self._off or req_id in self._refused or new.resumed:
            return
        if BEAM_PROMPT_KEY in (new.extra_args or {}):
            return  # a trace of one token tells nothing
        try:
            choice = parse_options(new.extra_args)
        except OptionError as error:
            # Whoever wants to be left out is left out, whatever else it says.
            if (new.extra_args or {}).get(CHOICE_KEY) == "off":
                self._off.add(req_id)
            else:
                self._refuse(new, "bad_options", str(error))
            return
        if choice.choice == "off":
            self._off.add(req_id)
        elif choice.choice == "trace" and config.requests.opt_in:
            self._start(new, "opt_in", choice, config, local_layers)
        elif choice.choice == "trace":
            self._refuse(new, "opt_in_off")
        elif config.enabled and self._is_sampled(req_id, choice, config.requests.trace_rate):
            self._start(new, "sampled", replace(choice, options=self._sampled()), config, local_layers)

    def _is_sampled(self, req_id: str, choice: ClientChoice, rate: float) -> bool:
        if choice.sampled is None or rate <= 0:  # no API server has chosen; by the id, so that all ranks agree
            return is_sampled_request(external_id(req_id), rate)
        return choice.sampled

    def _start(
        self, new: Arrival, why: Why, choice: ClientChoice, config: GlassboxConfig, local_layers: frozenset[int]
    ) -> None:
        host, options = self._host, choice.options
        asked_layers, asked_heads = frozenset(options.layers or ()), frozenset(options.heads or ())
        kept = tuple(n for n in sorted(local_layers) if options.layers is None or host.layers[n] in asked_layers)
        if not config.enabled:
            self._refuse(new, "disabled")
        elif host.unobserved:
            self._refuse(new, "not_observed", host.unobserved)
        elif not kept and why == "sampled" and options.layers is not None:
            return  # probes read other layers, those of other pipeline stages
        elif not kept:
            detail = f"glassbox_layers must name a measured layer of {host.layers}"
            self._refuse(new, "bad_options", detail, lacks_layers=True)
        elif options.heads is not None and min(options.heads) >= host.num_heads_total:
            self._refuse(new, "bad_options", f"glassbox_heads must be below {host.num_heads_total}")
        elif not host.knows_positions:
            self._refuse(new, "positions")
        elif self._spent:
            self._refuse(new, "budget")
        elif len(self._active) >= config.requests.max_active:
            self._refuse(new, "max_active")
        elif (reason := self._over_quota(choice.client, config.requests.per_client)) is not None:
            self._refuse(new, reason)
        elif self._room() <= 0:
            self._refuse(new, "memory")
        else:
            self._traced[why] += 1
            trace = self._active[new.req_id] = ActiveTrace(
                host,
                new.req_id,
                why=why,
                options=options,
                traceparent=choice.traceparent,
                requested_model=choice.model,
                adapter=new.adapter,
                client=choice.client,
                sampling_params=new.sampling_params,
                prompt_len=new.prompt_len,
                local_layers=kept,
                head_columns=tuple(
                    column
                    for column in range(host.num_heads)
                    if options.heads is None or host.head_offset + column in asked_heads
                ),
            )
            self._bound(trace, config)

    def _bound(self, trace: ActiveTrace, config: GlassboxConfig) -> None:
        """Refuse what of its options is beyond a bound: the request is traced without."""
        limits, arrays = config.requests, trace.options.arrays
        if "keys" in arrays and (why := self._too_much_to_keep(trace)):
            arrays -= {"queries", "keys", "score_params"}
            self._leave_out(trace, "signals", arrays, why)
        if "singular_values" in arrays and not 0 < self._host.head_size <= MAX_GRAM_HEAD_SIZE:
            arrays -= {"singular_values"}
            why = f"singular values are for heads of at most {MAX_GRAM_HEAD_SIZE} numbers, got {self._host.head_size}"
            self._leave_out(trace, "signals", arrays, why)
        if trace.prompt == "sampled":
            return
        of_prompt = arrays - {"received", "received_squares", "singular_values", "queries", "keys", "score_params"}
        if trace.prompt_len > limits.max_prompt_rows:
            why = (
                f"only the prompt's sampled rows are measured: it has {trace.prompt_len} tokens, and "
                f"requests.max_prompt_rows is {limits.max_prompt_rows}"
            )
            self._leave_out(trace, "max_prompt_rows", of_prompt, why, whole_prompt=False)
            return
        needed, room = trace.whole_nbytes(trace.prompt_len), self._room() + trace.nbytes
        if needed > min(limits.max_trace_mb * _MB, room):
            why = (
                f"only the prompt's sampled rows are measured: all {trace.prompt_len} need {needed / _MB:.1f} MB, and "
                f"requests.max_trace_mb is {limits.max_trace_mb}, with {max(room, 0) / _MB:.1f} MB left of "
                f"max_active_mb; raise them, or ask for fewer layers and heads"
            )
            self._leave_out(trace, "prompt_memory", of_prompt, why, whole_prompt=False)

    def _too_much_to_keep(self, trace: ActiveTrace) -> str:
        host, options = self._host, trace.options
        num_heads = host.num_heads_total if options.heads is None else len(options.heads)
        places = len(trace.local_layers) * num_heads
        if places > MAX_KEPT_PLACES:
            return (
                f"queries and keys are not kept: signals on demand are for at most {MAX_KEPT_PLACES} layers x heads, "
                f"got {places}"
            )
        if not host.head_size:
            return "queries and keys are not kept: the size of the heads isn't known"
        return TOO_LONG_FOR_KEYS if trace.prompt_len > MAX_KEPT_TOKENS else ""

    def _leave_out(
        self, trace: ActiveTrace, reason: Reason, arrays: frozenset[str], why: str, *, whole_prompt: bool = True
    ) -> None:
        trace.keep(arrays)
        if not whole_prompt:
            trace.prompt = "sampled"
        trace.note(why)
        self._refusals[reason] += 1
        log_once(
            logger,
            logging.WARNING,
            f"refused-{reason}",
            "Request %s is traced, but not as it asked: %s. Further ones are only counted "
            "(glassbox_trace_refused_total{reason=%r}).",
            trace.request_id,
            why,
            reason,
        )

    def _over_quota(self, client: str | None, limits: PerClientConfig) -> Reason | None:
        """Which of its limits keeps a client from another trace. Clients that can't be told apart have none."""
        if client is None:
            return None
        if sum(trace.client == client for trace in self._active.values()) >= limits.max_active:
            return "client_max_active"
        return "client_rows" if self._quota.is_used_up(client, limits.rows_per_second) else None

    def _room(self) -> int:
        """Bytes that traces may still take, those that wait to be written counted."""
        assert self._config is not None
        used = sum(trace.nbytes for trace in (*self._active.values(), *list(self._ended)))
        return self._config.requests.max_active_mb * _MB - used

    def _refuse(self, new: Arrival, reason: Reason, detail: str = "", *, lacks_layers: bool = False) -> None:
        given = new.extra_args or {}
        why = f"{REFUSAL_REASONS[reason]}{f' ({detail})' if detail else ''}"
        awaited = Refusal(request_digest(new.req_id, given.get(CLIENT_KEY)), why, time.time(), lacks_layers)
        self._refused[new.req_id] = awaited if RESPOND_KEY in given else None
        self._refusals[reason] += 1
        log_once(
            logger,
            logging.WARNING,
            f"refused-{reason}",
            "Request %s is served, but not traced: %s. Further ones are only counted "
            "(glassbox_trace_refused_total{reason=%r}).",
            external_id(new.req_id),
            why,
            reason,
        )

    def _finish(self, runner: Runner, req_id: str) -> None:
        self._off.discard(req_id)
        if (refusal := self._refused.pop(req_id, None)) is not None:
            self._on_refused(refusal)
        trace = self._active.pop(req_id, None)
        if trace is None:
            return
        include_text = self._config is not None and self._config.requests.include_text
        if (tokens := request_tokens(runner, req_id)) is not None:
            self._deferred.add(lambda: self._end_with(trace, tokens, trace.tokens is not None))
        elif (copy := copy_tokens(runner, req_id, trace.sampling_params)) is not None:
            self._deferred.add(lambda: self._end_with(trace, copy.tokens(), include_text), copy.event)
        else:
            self._deferred.add(lambda: self._end(trace, "finished"))
        if trace.options.respond:
            self._on_awaited()

    def _end_with(self, trace: ActiveTrace, tokens: RequestTokens, keep: bool) -> None:
        tokens = until_end(tokens)
        if keep:
            trace.tokens = tokens
        aborted = was_aborted(tokens, self._host.max_model_len)
        self._end(trace, "aborted" if aborted else "finished", len(tokens.generated))

    def _end(
        self, trace: ActiveTrace, status: Literal["finished", "aborted", "lost"], num_generated: int | None = None
    ) -> None:
        trace.end(status, num_generated)
        self._ended.append(trace)


def _runs(values: npt.NDArray[np.int32]) -> list[tuple[int, int]]:
    """(start, end) of each run of equal values."""
    if not len(values):
        return []
    starts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(values)], strict=True))
