"""Which steps, requests, layers and rows are measured.

Owns the choice, nothing else: numpy only, no torch, no vLLM, no clock and no randomness, so that all ranks of
a server choose alike and a test can replay any choice.
"""

import hashlib
import math
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.core.rows import (
    NUM_ROW_COLUMNS,
    ROW_BATCH,
    ROW_DECODE,
    ROW_PHASE,
    ROW_PROMPT_LEN,
    ROW_QUERY,
    ROW_SLOT,
    ROW_UNCOUNTED,
)

# Fixed point: with floats two ranks could disagree, and the share would drift after many steps.
_RATE_BITS: Final = 32

# The golden ratio's fractional part, in fixed point as well.
_GOLDEN: Final = 0x9E3779B97F4A7C15

# Seconds of step time over which costs are averaged: load changes within seconds, single steps scatter.
_AVERAGE_S: Final = 10.0
# Step time within which a single sample, however dear (the first one compiles kernels), is paid back.
_REPAY_S: Final = 60.0
# The level falls only if the lower one is predicted to cost at most this share of the budget. As levels
# differ by a factor of 2, that leaves a band, 0.35 to 1 of the budget, in which nothing moves.
_LOWER_BELOW: Final = 0.7
# After an overdraft, until it is paid back, costs are held to this share of the budget.
_REPAY_AT: Final = 0.5
# What a step costs though it is not measured may exceed the budget; this share of it stays for measuring, so
# that the budget never blinds glassbox.
_MIN_SHARE: Final = 0.1
# The sample and the traces have this share of the budget for sure, and what the other one leaves of its half.
_OWN_SHARE: Final = 0.5
_MAX_LEVEL: Final = 32
# Of a step that measures traces: what it costs beyond so many seconds of step time is forgiven (kernels are compiled).
_TRACE_REPAY_S: Final = 600.0
# The same of what clients can ask for again and again though it takes seconds: whole prompts, and ended traces.
_DEAR_REPAY_S: Final = 3600.0
# A trace that would keep fewer than one step of 2^3 tells too little to begin it.
_REFUSED_FROM_LEVEL: Final = 4


def is_sampled_request(external: str, rate: float) -> bool:
    """Whether `trace_rate` chooses a request: by its external id alone, so all ranks and all its samples agree."""
    if rate <= 0:
        return False
    digest = hashlib.blake2b(external.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < rate * 2.0**64


def is_sampled_step(step: int, sample_rate: float, level: int = 0) -> bool:
    """Whether step number `step` is measured. Stateless, so every rank decides alike.

    Sampled steps are spread evenly: of any N consecutive steps of level 0, N * sample_rate rounded up or down
    are sampled, and gaps between sampled steps differ by at most one step. Level k keeps every 2^k-th of
    them, so what a higher level samples a lower one samples too.

    Args:
        step: from 0.
        sample_rate: 0 to 1.
        level: 0 and up.
    """
    if sample_rate <= 0:
        return False
    rate = _fixed_point(sample_rate)
    before = (step * rate) >> _RATE_BITS
    after = ((step + 1) * rate) >> _RATE_BITS
    return after > before and before % (1 << level) == 0


@lru_cache(maxsize=16)
def _fixed_point(sample_rate: float) -> int:
    return max(1, round(min(sample_rate, 1.0) * (1 << _RATE_BITS)))


def rate_of_steps(sample_rate: float, num_layers: int, at_once: int) -> float:
    """Share of steps to measure so that each layer is measured at the sample rate; 1 where that would need more.

    Args:
        sample_rate: 0 to 1.
        num_layers: that take turns.
        at_once: how many of them a measured step measures.
    """
    return min(sample_rate * num_layers / at_once, 1.0) if at_once < num_layers else sample_rate


class LayerTurns:
    """Whose turn it is among layers of which a measured step measures some.

    In a round each has one turn, so that at any time none has had more than one more than another. Each round begins at
    another layer, the golden ratio of all layers further on: never twice in the same way, and away from any period. So
    no pattern of requests, say a prompt in every fourth step, always meets the same layers, as it would if the rounds
    went on from each other. Ranks that measure the same steps measure the same layers in them; one whose budget leaves
    out steps goes on by itself.
    """

    def __init__(self) -> None:
        self._layers: frozenset[int] = frozenset()
        # Of this round.
        self._left: list[int] = []
        self._rounds = 0

    def take(self, layers: frozenset[int], count: int) -> frozenset[int]:
        """The `count` layers whose turn it is. Other layers than the last time begin with a round of their own."""
        if layers != self._layers:
            self._layers, self._left = layers, []
        taken, self._left = self._left[:count], self._left[count:]
        if (more := count - len(taken)) > 0:
            # A step measures a layer once: those of the round before that are in it have their turn later in this one.
            order = sorted(self._order(), key=lambda layer: layer in taken)
            taken, self._left = taken + order[:more], order[more:]
        return frozenset(taken)

    def _order(self) -> list[int]:
        layers = sorted(self._layers)
        start = (self._rounds * _GOLDEN % (1 << 64) * len(layers)) >> 64
        self._rounds += 1
        return layers[start:] + layers[:start]


class StepSampler:
    """Counts engine steps, says which are measured, and keeps the cost of measuring within a budget.

    The budget is a share of step time, less what rows of traced requests take of it (`TraceBudget`). From what steps
    cost (moving averages over some seconds of step time) follows the level, the number of halvings of the sample rate:
    the smallest whose predicted cost is within the budget. A running account of overdrafts corrects what the prediction
    misses.

    Args:
        sample_rate: share of steps to measure, 0 to 1, see `rate_of_steps`.
        overhead_budget: largest share of step time that measuring may cost; None is no limit.
    """

    def __init__(self, sample_rate: float, overhead_budget: float | None = None) -> None:
        self._rate = sample_rate
        self._budget = overhead_budget
        self._step = 0
        self._level = 0
        self._time_s = 0.0  # step time so far
        self._step_time = _MovingMean()
        self._sampled_cost = _MovingMean()
        self._idle_cost = _MovingMean()
        self._traced_cost = _MovingMean()
        self._debt_s = 0.0  # spent beyond the budget
        self._repaying = False
        self._measured_at_level = False

    @property
    def step(self) -> int:
        """Number of steps so far."""
        return self._step

    @property
    def level(self) -> int:
        """Halvings of the sample rate now in force."""
        return self._level

    @property
    def effective_rate(self) -> float:
        """Share of steps measured now: the sample rate after the budget."""
        return math.ldexp(self._rate, -self._level)

    def set_rate(self, sample_rate: float) -> None:
        """Change the sample rate from the next step on; the count of steps and the known costs stay."""
        if sample_rate != self._rate:
            self._rate = sample_rate
            self._adjust()

    def set_budget(self, overhead_budget: float | None) -> None:
        """Change the budget; None lifts it at once."""
        if overhead_budget == self._budget:
            return
        self._budget = overhead_budget
        self._debt_s, self._repaying = 0.0, False
        if overhead_budget is None:
            self._set_level(0)
        else:
            self._adjust()

    def next_step(self) -> bool:
        """Count a step; True if it is to be measured."""
        sampled = is_sampled_step(self._step, self._rate, self._level)
        self._step += 1
        return sampled

    def own_cost(self, overhead_s: float, sampled: bool, counted_share: float) -> float:
        """Seconds that a step with rows of traced requests would have taken without them.

        As many as such steps take on average: what traces ask besides (top positions, spans) costs more than any row.
        As long as none is known, the share of the rows that the sample counts.
        """
        mean = self._sampled_cost if sampled else self._idle_cost
        return min(overhead_s, mean.mean) if mean.known else overhead_s * counted_share * sampled

    def record(self, overhead_s: float, step_s: float, sampled: bool, traced_s: float = 0.0) -> None:
        """Tell what a step took.

        Args:
            overhead_s: seconds glassbox spent in it, without those for traces.
            step_s: seconds of the whole step, glassbox's included. A step without a duration is left out.
            sampled: what `next_step` said.
            traced_s: seconds that glassbox spent on rows of traced requests.
        """
        if not (step_s > 0 and overhead_s >= 0):
            return
        if self._budget is None and not sampled:
            return  # measured steps tell enough for a budget to begin with, and this is called in every step
        self._time_s += step_s
        self._step_time.add(step_s, self._time_s)
        self._traced_cost.add(traced_s, self._time_s)
        if not traced_s:  # else the rest is only estimated, and from these means
            (self._sampled_cost if sampled else self._idle_cost).add(overhead_s, self._time_s)
        self._measured_at_level |= sampled
        if self._budget is None:
            return
        most_s = self._budget * _REPAY_S
        self._debt_s = min(max(self._debt_s + overhead_s - self._own_budget(self._budget) * step_s, -most_s), most_s)
        self._adjust()

    def _own_budget(self, budget: float) -> float:
        """What traces leave of the budget, at least its half."""
        return budget - min(self._traced_cost.mean / self._step_time.mean, (1 - _OWN_SHARE) * budget)

    def _adjust(self) -> None:
        if self._budget is None or not self._step_time.known or not self._sampled_cost.known:
            return
        # One dear sample must not silence measuring for longer than it takes to pay it back.
        cost_s = min(self._sampled_cost.mean, self._budget * _REPAY_S)
        share = self._rate * cost_s / self._step_time.mean
        idle_share = self._idle_cost.mean / self._step_time.mean
        allowed = max(self._own_budget(self._budget) - idle_share, _MIN_SHARE * self._budget)
        # A sample is paid at once and earned until the next, so a debt of two of them means nothing yet.
        if self._debt_s > 2 * cost_s + self._budget:
            self._repaying = True
        elif self._debt_s <= 0:
            self._repaying = False
        target = allowed * _REPAY_AT if self._repaying else allowed
        if math.ldexp(share, -self._level) > target:
            self._set_level(min(math.ceil(math.log2(share / target)), _MAX_LEVEL))
        elif (
            self._level
            and self._measured_at_level
            and self._debt_s <= 0
            and math.ldexp(share, 1 - self._level) <= _LOWER_BELOW * allowed
        ):
            self._set_level(self._level - 1)

    def _set_level(self, level: int) -> None:
        if level != self._level:
            self._level = level
            self._measured_at_level = False


class TraceBudget:
    """Keeps what rows of traced requests cost within the budget: which steps measure them, and who may begin a trace.

    They take what the sample leaves of the budget, at least its half. Traces that come now and then are paid from an
    account, up to what a minute earns, and lose nothing. Once it is overdrawn they keep to what is earned while they
    run: at level k every 2^k-th of the steps with traced requests measures them, so what one rank keeps at a higher
    level the others keep at a lower one. A pause fills the account again. What ended traces cost beside the steps is
    taken from the same account.

    Args:
        overhead_budget: largest share of step time that measuring may cost, traces and sample together; None is no
            limit.
    """

    def __init__(self, overhead_budget: float | None = None) -> None:
        self._budget: float | None = None
        self._steps_with_traces = 0
        self._level = 0
        self._time_s = 0.0
        self._step_time = _MovingMean()
        self._traced_cost = _MovingMean()  # of a step that measures them
        self._sample_cost = _MovingMean()  # of any step
        self._account_s = 0.0
        self._overdrawn = False
        self.set_budget(overhead_budget)

    @property
    def level(self) -> int:
        """Halvings of the steps that measure traced requests."""
        return self._level

    @property
    def refuses(self) -> bool:
        """Whether so little is left that no further trace may begin."""
        return self._level >= _REFUSED_FROM_LEVEL or self._is_deep_in_debt

    def set_budget(self, overhead_budget: float | None) -> None:
        """Change the budget; the account starts anew. None lifts it at once."""
        if overhead_budget == self._budget:
            return
        self._budget = overhead_budget
        self._account_s = 0.0 if overhead_budget is None else overhead_budget * _REPAY_S
        self._overdrawn, self._level = False, 0

    def next_step(self) -> bool:
        """Count a step with traced requests; True if their rows are to be measured."""
        number = self._steps_with_traces
        self._steps_with_traces += 1
        if self._budget is None:
            return True
        # The last of 2^level, where `is_sampled_step` takes the first: the sample's cost is known from steps without
        # traces. However dear a step is: nothing more before most of it is paid back.
        return (number + 1) % (1 << self._level) == 0 and not self._is_deep_in_debt

    @property
    def _is_deep_in_debt(self) -> bool:
        return self._budget is not None and self._account_s <= -_REPAY_AT * self._budget * _REPAY_S

    def charge(self, seconds: float) -> None:
        """Tell what traces took beside the steps since the last call."""
        if self._budget is not None and seconds > 0:
            self._account_s = self._owed(self._account_s - seconds, self._budget, dear=True)
            self._overdrawn |= self._account_s < 0

    def _owed(self, account_s: float, budget: float, *, dear: bool) -> float:
        """The account after a cost, which is forgiven as far as it goes beyond a bound; older debts are not."""
        bound_s = budget * (_DEAR_REPAY_S if dear else _TRACE_REPAY_S)
        return max(account_s, min(-bound_s, self._account_s))

    def record(self, traced_s: float, sample_s: float, step_s: float, *, wanted: bool, dear: bool = False) -> None:
        """Tell what a step took.

        Args:
            traced_s: seconds that glassbox spent on rows of traced requests.
            sample_s: seconds that it spent besides.
            step_s: seconds of the whole step, glassbox's included. A step without a duration is left out.
            wanted: whether the step had traced requests, measured or not.
            dear: whether it measured whole prompts.
        """
        if self._budget is None or not (step_s > 0 and traced_s >= 0 and sample_s >= 0):
            return
        self._time_s += step_s
        self._step_time.add(step_s, self._time_s)
        self._sample_cost.add(sample_s, self._time_s)
        if traced_s:
            self._traced_cost.add(traced_s, self._time_s)
        mean_s, most_s = self._step_time.mean, self._budget * _REPAY_S
        allowed = self._budget - min(self._sample_cost.mean / mean_s, (1 - _OWN_SHARE) * self._budget)
        account_s = self._account_s + allowed * step_s - traced_s
        if self._overdrawn and wanted:
            account_s = min(account_s, 0.0)  # saved is what a pause earns, so that traces come evenly in between
        self._account_s = min(self._owed(account_s, self._budget, dear=dear), most_s)
        if self._account_s < 0:
            self._overdrawn = True
        elif self._account_s >= most_s / 2:
            self._overdrawn = False
        self._level = self._level_for(allowed) if self._overdrawn else 0

    def _level_for(self, allowed: float) -> int:
        share = min(self._traced_cost.mean, allowed * _REPAY_S) / self._step_time.mean
        # A sample is paid at once and earned until the next, as in StepSampler.
        if self._account_s < -2 * self._traced_cost.mean:
            allowed *= _REPAY_AT
        return 0 if share <= allowed else min(math.ceil(math.log2(share / allowed)), _MAX_LEVEL)


class _MovingMean:
    """Mean of the latest values, exponentially forgotten over `_AVERAGE_S` seconds of step time.

    Time since the last value counts, too: after a long pause the next value alone decides.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0
        self._last_s = 0.0

    @property
    def known(self) -> bool:
        return self._weight > 0

    @property
    def mean(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    def add(self, value: float, now_s: float) -> None:
        keep = math.exp((self._last_s - now_s) / _AVERAGE_S)
        self._last_s = now_s
        self._sum = self._sum * keep + value
        self._weight = self._weight * keep + 1.0


class RowSampler:
    """Chooses the rows of a sampled step.

    Candidates are the decode rows (tokens that were generated) and of each prompt `prefill_rows_per_request`
    positions, evenly spaced over the whole prompt with its last one included, whichever chunk they come in. A token
    that is computed again is none. Nor is a draft token, of which the step can't know whether it will be kept, but
    for a trace, which hears of it later. If there are more candidates than `max_rows_per_step`, they take turns: a
    window moves over them from step to step.

    Args:
        max_rows_per_step: largest number of rows of a step.
        prefill_rows_per_request: positions per prompt; 0 is none, and a shorter prompt gives all it has.
        max_traced_rows: largest number of rows of traced requests in a step; None is no other than the first.
    """

    def __init__(
        self,
        max_rows_per_step: int,
        prefill_rows_per_request: int,
        *,
        max_traced_rows: int | None = None,
    ) -> None:
        self._max_rows = max_rows_per_step
        self._max_traced = max_rows_per_step if max_traced_rows is None else min(max_traced_rows, max_rows_per_step)
        self._prefill_rows = prefill_rows_per_request
        self._turns, self._traced_turns = _Turns(), _Turns()

    def select(
        self,
        num_scheduled: npt.ArrayLike,
        num_computed: npt.ArrayLike,
        prompt_len: npt.ArrayLike,
        query_start: npt.ArrayLike,
        *,
        new_from: npt.ArrayLike = 0,
        num_drafts: npt.ArrayLike = 0,
        traced: npt.NDArray[np.bool_] | None = None,
        excluded: npt.NDArray[np.bool_] | None = None,
        sampled: bool = True,
    ) -> tuple[npt.NDArray[np.int32], int]:
        """Choose the rows of one step.

        Args:
            num_scheduled: [B] tokens of each request in this step.
            num_computed: [B] tokens of it that were computed before.
            prompt_len: [B] tokens of its prompt.
            query_start: [B+1] index of its first token among the step's flattened tokens.
            new_from: [B] position before which its tokens are computed again.
            num_drafts: [B] draft tokens, which are the last ones of it in this step.
            traced: [B] requests all of whose candidates are wanted, drafts included; None is none.
            excluded: [B] requests that have no candidates; None is none.
            sampled: False in a step that is measured for traced requests only.

        Returns:
            rows int32 [R, NUM_ROW_COLUMNS], R <= max_rows_per_step, ascending in ROW_QUERY, and the number of
            candidates other than drafts that were left out. Rows of traced requests come first in that budget.
            Drafts, and those that the sample alone, over what remains of it, would not have chosen, are marked
            ROW_UNCOUNTED.
        """
        computed = np.asarray(num_computed, dtype=np.int64)
        prompt = np.asarray(prompt_len, dtype=np.int64)
        end = computed + np.asarray(num_scheduled, dtype=np.int64)
        first = np.maximum(computed, np.asarray(new_from, dtype=np.int64))

        # Positions of the fixed choice lie at ceil((k+1) P / M) - 1, so floor(x M / P) of them are below x.
        chosen = np.minimum(self._prefill_rows, prompt)
        divisor = np.maximum(prompt, 1)
        prefill_from = np.minimum(first, prompt) * chosen // divisor
        num_prefill = np.maximum(np.minimum(end, prompt) * chosen // divisor - prefill_from, 0)

        decode_from, drafts_from = np.maximum(first, prompt), end - np.asarray(num_drafts, dtype=np.int64)
        num_certain = num_prefill + np.maximum(drafts_from - decode_from, 0)
        # Candidates of each request, in the order of their positions.
        num = num_certain
        if traced is not None:
            num = np.where(traced, num_prefill + np.maximum(end - decode_from, 0), num_certain)
        absent = excluded
        if not sampled:
            absent = np.ones(end.size, dtype=bool) if traced is None else ~traced
        if absent is not None:
            num = np.where(absent, 0, num)

        last = np.cumsum(num)
        total = int(last[-1]) if last.size else 0
        if traced is None:
            candidate, counted, in_traces = self._turns.take(total, self._max_rows), None, None
            num_left_out = total - candidate.size
        else:
            within = np.arange(total) - np.repeat(last - num, num)
            certain = within < np.repeat(num_certain, num)
            candidate, counted, in_traces = self._take_traced(np.repeat(traced, num), certain, sampled)
            num_left_out = int(np.count_nonzero(certain) - np.count_nonzero(certain[candidate]))
        request = np.searchsorted(last, candidate, side="right")
        within = candidate - (last - num)[request]
        is_decode = within >= num_prefill[request]

        # Ceiling division; `chosen` is 0 only where there are no prefill candidates.
        count = np.maximum(chosen[request], 1)
        prefill_position = -(-(prefill_from[request] + within + 1) * prompt[request] // count) - 1
        decode_position = decode_from[request] + within - num_prefill[request]
        position = np.where(is_decode, decode_position, prefill_position)

        rows = np.empty((candidate.size, NUM_ROW_COLUMNS), dtype=np.int32)
        rows[:, ROW_QUERY] = np.asarray(query_start, dtype=np.int64)[request] + position - computed[request]
        rows[:, ROW_BATCH] = request
        rows[:, ROW_PHASE] = np.where(is_decode, ROW_DECODE, 0)
        rows[:, ROW_PROMPT_LEN] = prompt[request]
        rows[:, ROW_SLOT] = -1
        if counted is not None and in_traces is not None:
            rows[~counted, ROW_PHASE] |= ROW_UNCOUNTED
            rows[in_traces, ROW_SLOT] = np.arange(np.count_nonzero(in_traces))
        return rows, num_left_out

    def _take_traced(
        self, traced: npt.NDArray[np.bool_], certain: npt.NDArray[np.bool_], sampled: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Ascending numbers of the candidates to measure, which of them are the sample, and which go to traces.

        The sample is taken over all certain candidates, traced ones included, so that it stays one of all traffic.

        Args:
            traced: for each candidate, whether its request is traced.
            certain: for each candidate, whether it is no draft.
        """
        wanted = np.flatnonzero(traced)
        if wanted.size > self._max_traced:
            wanted = wanted[self._traced_turns.take(wanted.size, self._max_traced)]
        room = self._max_rows - wanted.size
        sample = np.zeros(0, dtype=np.int64)
        if sampled:
            sampleable = np.flatnonzero(certain)
            sample = sampleable[self._turns.take(sampleable.size, room)]
        candidate = np.union1d(sample, wanted)
        return candidate, _among(candidate, sample), _among(candidate, wanted)


def _among(values: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return np.isin(values, chosen, assume_unique=True)


class _Turns:
    """A window that moves over candidates from step to step."""

    def __init__(self) -> None:
        self._cursor = 0

    def take(self, total: int, room: int) -> npt.NDArray[np.int64]:
        """Ascending numbers of the `room` candidates whose turn it is, of `total`."""
        if total <= room:
            return np.arange(total, dtype=np.int64)
        start = self._cursor % total
        self._cursor = (start + room) % total
        return np.sort((start + np.arange(room, dtype=np.int64)) % total)
