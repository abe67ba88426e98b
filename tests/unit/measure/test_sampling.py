"""Which steps and rows are measured: against brute-force models and simulated servers."""

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbox.core.rows import NUM_ROW_COLUMNS, ROW_BATCH, ROW_DECODE, ROW_PHASE, ROW_QUERY, ROW_SLOT, ROW_UNCOUNTED
from glassbox.measure.sampling import LayerTurns, RowSampler, StepSampler, TraceBudget, is_sampled_step, rate_of_steps


def sampled_steps(rate: float, level: int = 0, steps: int = 10_000) -> list[int]:
    return [step for step in range(steps) if is_sampled_step(step, rate, level)]


class TestIsSampledStep:
    def test_extremes(self) -> None:
        """Rate 0 samples nothing and rate 1 every step."""
        assert sampled_steps(0.0, steps=100) == []
        assert sampled_steps(1.0, steps=100) == list(range(100))

    def test_one_in_four(self) -> None:
        """Rate 0.25 samples each fourth step."""
        assert sampled_steps(0.25, steps=12) == [3, 7, 11]

    @given(st.floats(1e-3, 1.0))
    @settings(max_examples=60, deadline=None)
    def test_share(self, rate: float) -> None:
        """Of 10,000 steps, rate * 10,000 are sampled, rounded up or down."""
        assert math.floor(rate * 10_000) - 1 <= len(sampled_steps(rate)) <= math.ceil(rate * 10_000)

    @given(st.floats(1e-3, 1.0), st.integers(0, 4))
    @settings(max_examples=60, deadline=None)
    def test_even_spread(self, rate: float, level: int) -> None:
        """Gaps between sampled steps differ by at most one step, at any level."""
        gaps = {after - before for before, after in pairwise(sampled_steps(rate, level))}
        assert not gaps or max(gaps) - min(gaps) <= 1

    @given(st.floats(1e-3, 1.0), st.integers(0, 5))
    @settings(max_examples=40, deadline=None)
    def test_nested_levels(self, rate: float, level: int) -> None:
        """What a rank on a higher level samples, a rank on a lower one samples too: each second of it."""
        lower, higher = sampled_steps(rate, level), sampled_steps(rate, level + 1)
        assert higher == lower[::2]

    @pytest.mark.parametrize("start", [10**9, 2**53, 2**80])
    def test_long_running_server(self, start: int) -> None:
        """After any number of steps the share is still exact."""
        assert sum(is_sampled_step(start + i, 0.01) for i in range(10_000)) in {99, 100, 101}

    def test_tiny_rate(self) -> None:
        """A rate below the resolution is not rounded to never: it samples once in 2^32 steps."""
        assert is_sampled_step(2**32 - 1, 1e-12)


Cost = Callable[[int, random.Random], float]


def constant(seconds: float) -> Cost:
    return lambda step, rng: seconds


def noisy(mean_s: float, sigma: float) -> Cost:
    """Log-normal with the given mean."""
    return lambda step, rng: mean_s * rng.lognormvariate(-sigma * sigma / 2, sigma)


def turns_of(num_layers: int, count: int, steps: int) -> np.ndarray:
    """bool [steps, L]: which layers have their turn in each step."""
    turns, layers = LayerTurns(), frozenset(range(num_layers))
    taken = np.zeros((steps, num_layers), dtype=bool)
    for step in range(steps):
        its = turns.take(layers, count)
        assert count == len(its)
        taken[step, list(its)] = True
    return taken


class TestLayerTurns:
    @given(st.integers(1, 40), st.data())
    def test_even_at_any_time(self, num_layers: int, data: st.DataObject) -> None:
        """No layer ever has more than one turn more than another, however many have theirs in a step."""
        count = data.draw(st.integers(1, num_layers))
        so_far = turns_of(num_layers, count, 3 * num_layers + 5).cumsum(0)
        assert (so_far.max(1) - so_far.min(1)).max() <= 1

    @given(st.lists(st.integers(1, 12), min_size=2, max_size=40))
    def test_even_when_edited(self, counts: list[int]) -> None:
        """Nor if the number of layers per step changes from step to step."""
        turns, had = LayerTurns(), np.zeros(12, dtype=int)
        for count in counts:
            had[list(turns.take(frozenset(range(12)), count))] += 1
            assert had.max() - had.min() <= 1

    @pytest.mark.parametrize(("num_layers", "count"), [(32, 1), (32, 8), (24, 5), (3, 1)])
    @pytest.mark.parametrize("period", [2, 3, 8, 13])
    def test_no_pattern_meets_always_the_same_layers(self, num_layers: int, count: int, period: int) -> None:
        """Of what comes in every second, third ... measured step each layer sees its share, of 100 to a quarter."""
        taken = turns_of(num_layers, count, 100 * num_layers * period // count)
        by_phase = np.stack([taken[phase::period].sum(0) for phase in range(period)])
        assert 75 <= by_phase.min()
        assert by_phase.max() <= 125

    def test_other_layers(self) -> None:
        """They begin with a round of their own."""
        turns = LayerTurns()
        first = turns.take(frozenset(range(8)), 3)
        assert first < frozenset(range(8))
        taken = [turns.take(frozenset({4, 9, 11}), 1) for _ in range(3)]
        assert frozenset({4, 9, 11}) == frozenset().union(*taken)

    def test_the_rate_of_steps(self) -> None:
        """So many times the rate as there are turns in a round, and no more than every step."""
        assert pytest.approx(0.08) == rate_of_steps(0.01, 32, 4)
        assert 1.0 == rate_of_steps(0.5, 32, 4)
        assert 0.01 == rate_of_steps(0.01, 32, 32) == rate_of_steps(0.01, 0, 0)


class Server:
    """Drives a StepSampler with a cost model: measuring a step adds `cost` to the `base` it takes anyway."""

    def __init__(self, rate: float, budget: float | None, base: Cost, cost: Cost) -> None:
        self.sampler = StepSampler(rate, budget)
        self.base, self.cost = base, cost
        self.rng = random.Random(7)
        self.steps = 0
        self.level_changes = 0

    def run(self, steps: int) -> float:
        """Share of the time of these steps that measuring took."""
        overhead_s = time_s = 0.0
        for _ in range(steps):
            level = self.sampler.level
            sampled = self.sampler.next_step()
            cost_s = self.cost(self.steps, self.rng) if sampled else 0.0
            step_s = self.base(self.steps, self.rng) + cost_s
            self.sampler.record(cost_s, step_s, sampled)
            overhead_s += cost_s
            time_s += step_s
            self.steps += 1
            self.level_changes += self.sampler.level != level
        return overhead_s / time_s


class TracedServer:
    """Drives both samplers, as the observer does, with a constant base of 10 ms a step."""

    def __init__(self, budget: float, *, rate: float, sample_s: float, traced_s: float) -> None:
        self.sampler, self.traces = StepSampler(rate, budget), TraceBudget(budget)
        self.sample_s, self.traced_s = sample_s, traced_s

    def run(self, steps: int, *, traced: bool = True) -> tuple[float, float]:
        """Shares of the time of these steps that the sample and the traces took."""
        sample_s = traced_s = time_s = 0.0
        for _ in range(steps):
            sampled = self.sampler.next_step()
            measured = traced and self.traces.next_step()
            cost_s = self.sample_s * sampled + self.traced_s * measured
            own_s = self.sampler.own_cost(cost_s, sampled, 1.0) if measured else cost_s
            step_s = 0.01 + cost_s
            self.sampler.record(own_s, step_s, sampled, cost_s - own_s)
            self.traces.record(cost_s - own_s, own_s, step_s, wanted=traced)
            sample_s += self.sample_s * sampled
            traced_s += self.traced_s * measured
            time_s += step_s
        return sample_s / time_s, traced_s / time_s


class TestTraceBudget:
    @pytest.mark.parametrize("budget", [0.001, 0.01, 0.05])
    @pytest.mark.parametrize("traced_s", [0.0001, 0.003, 0.1])
    def test_long_run(self, budget: float, traced_s: float) -> None:
        """Traces in every step: both together stay within the budget, and each has a part of its half."""
        server = TracedServer(budget, rate=1.0, sample_s=0.002, traced_s=traced_s)
        server.run(20_000)
        sample, traces = server.run(40_000)
        assert sample + traces <= budget * 1.1
        assert sample >= budget / 8
        assert traces >= min(traced_s / 0.01, budget) / 8

    def test_leaves_what_the_other_does_not_use(self) -> None:
        """Without a sample traces have nearly all of the budget, without traces the sample has."""
        server = TracedServer(0.01, rate=0.0, sample_s=0.002, traced_s=0.002)
        server.run(20_000)
        assert 0.005 < server.run(40_000)[1] <= 0.0105
        server = TracedServer(0.01, rate=1.0, sample_s=0.002, traced_s=0.002)
        assert 0.004 < server.run(40_000, traced=False)[0] <= 0.0105

    def test_a_trace_now_and_then(self) -> None:
        """What comes rarely is paid from what was saved, and loses no step."""
        server = TracedServer(0.01, rate=0.01, sample_s=0.002, traced_s=0.01)
        for _ in range(20):
            server.run(5000, traced=False)
            assert server.run(20)[1] == pytest.approx(0.5, rel=0.05)

    def test_whole_prompts_again_and_again(self) -> None:
        """A step with a whole prompt takes 20 s each time one is measured: that is paid back, not forgiven."""
        traces, traced_s, time_s = TraceBudget(0.01), 0.0, 0.0
        for _ in range(80_000):
            cost_s = 20.0 * traces.next_step()
            traces.record(cost_s, 0.0, 0.1 + cost_s, wanted=True, dear=cost_s > 0)
            traced_s, time_s = traced_s + cost_s, time_s + 0.1 + cost_s
        assert 0.002 < traced_s / time_s <= 0.0125

    def test_what_ended_traces_cost_beside_the_steps(self) -> None:
        """Rows cost nearly nothing, but each ended trace 0.1 s: further ones are refused, and begin again later."""
        traces, begun, time_s = TraceBudget(0.01), 0, 0.0
        for _ in range(100_000):
            if not traces.refuses:
                traces.charge(0.1)
                begun += 1
            traces.record(1e-5 * traces.next_step(), 0.0, 0.01, wanted=True)
            time_s += 0.01
        assert 0.005 < 0.1 * begun / time_s <= 0.0125
        traces.set_budget(None)
        traces.charge(10.0)
        assert not traces.refuses

    def test_ranks(self) -> None:
        """What a rank on a higher level keeps, a rank on a lower one keeps too."""
        cheap, dear = TraceBudget(0.01), TraceBudget(0.01)
        kept: tuple[set[int], set[int]] = (set(), set())
        for step in range(30_000):
            for traces, cost_s, steps in ((cheap, 0.002, kept[0]), (dear, 0.008, kept[1])):
                measured = traces.next_step()
                if measured:
                    steps.add(step)
                traces.record(cost_s * measured, 0.0, 0.01 + cost_s * measured, wanted=True)
        late = {step for step in kept[1] if step > 5000}
        assert 0 < len(late) < len(kept[0])
        assert late <= kept[0]

    def test_edit(self) -> None:
        """Lifted, every step measures traces at once; a new budget begins with an account of its own."""
        server = TracedServer(0.001, rate=0.0, sample_s=0.0, traced_s=0.01)
        server.run(5000)
        assert server.traces.refuses
        server.traces.set_budget(None)
        assert (server.traces.refuses, [server.traces.next_step() for _ in range(8)]) == (False, [True] * 8)


class TestStepSampler:
    def test_counts_without_budget(self) -> None:
        """Without a budget the steps are those of the sample rate, whatever they cost."""
        sampler = StepSampler(0.25)
        sampled = []
        for _ in range(12):
            sampled.append(sampler.next_step())
            sampler.record(1.0, 1.0, sampled[-1])
        assert [step for step, yes in enumerate(sampled) if yes] == [3, 7, 11]
        assert (sampler.step, sampler.level, sampler.effective_rate) == (12, 0, 0.25)

    @pytest.mark.parametrize("budget", [0.001, 0.01, 0.05, 0.2])
    @pytest.mark.parametrize("base_s", [0.003, 0.008, 0.05])
    @pytest.mark.parametrize("sigma", [0.0, 0.5])
    def test_long_run_share(self, budget: float, base_s: float, sigma: float) -> None:
        """At rate 1 and 2 ms a sampled step, the share is within the budget and not below a fourth of it."""
        server = Server(1.0, budget, noisy(base_s, sigma), noisy(0.002, sigma))
        server.run(2000)
        unthrottled = 0.002 / (base_s + 0.002)
        assert min(budget / 4, unthrottled / 2) <= server.run(40_000) <= budget * 1.05

    def test_reacts_at_once(self) -> None:
        """At rate 1 and 5 ms steps one sample of 2 ms is enough to throttle to a budget of 0.01."""
        server = Server(1.0, 0.01, constant(0.003), constant(0.002))
        server.run(1)
        assert server.sampler.effective_rate * 0.002 / 0.005 <= 0.01

    def test_settles(self) -> None:
        """Under constant costs the level moves when it is found, and at most twice after."""
        server = Server(1.0, 0.01, constant(0.008), constant(0.002))
        server.run(100_000)
        assert 1 <= server.level_changes <= 3

    def test_noise_moves_the_level_little(self) -> None:
        """With costs that scatter by half their size, the level changes less than once in 5000 steps."""
        server = Server(1.0, 0.01, noisy(0.008, 0.5), noisy(0.002, 0.5))
        server.run(100_000)
        assert server.level_changes <= 20

    def test_rare_dear_samples(self) -> None:
        """When one sample in fifty costs 150 times as much, the long-run share still is within the budget."""

        def cost(step: int, rng: random.Random) -> float:
            return 0.0005 if rng.random() < 0.98 else 0.075

        server = Server(1.0, 0.01, constant(0.008), cost)
        server.run(2000)
        assert 0.01 / 4 <= server.run(150_000) <= 0.01 * 1.05

    def test_changing_load(self) -> None:
        """When costs change by a factor of 8 every 5000 steps, the long-run share is within the budget."""

        def cost(step: int, rng: random.Random) -> float:
            return 0.004 if step // 5000 % 2 else 0.0005

        server = Server(1.0, 0.01, constant(0.008), cost)
        server.run(2000)
        assert 0.01 / 4 <= server.run(100_000) <= 0.01 * 1.05

    def test_recovers(self) -> None:
        """When measuring becomes 20 times cheaper, the rate rises again within half a minute of step time."""
        costs_s = {"now": 0.02}
        server = Server(1.0, 0.05, constant(0.01), lambda step, rng: costs_s["now"])
        server.run(5000)
        throttled = server.sampler.effective_rate
        costs_s["now"] = 0.001
        server.run(3000)
        assert server.sampler.effective_rate >= 8 * throttled

    def test_first_sample_compiles(self) -> None:
        """A first sample of 30 s (kernels are compiled) is forgiven: in five minutes the budget is in use."""
        server = Server(1.0, 0.01, constant(0.01), lambda step, rng: 30.0 if step == 0 else 0.001)
        server.run(30_000)
        assert 0.01 / 4 <= server.run(10_000) <= 0.01 * 1.05

    def test_level_zero_within_budget(self) -> None:
        """A sample rate that costs less than the budget is not touched."""
        server = Server(0.01, 0.01, constant(0.008), constant(0.002))
        server.run(20_000)
        assert (server.level_changes, server.sampler.effective_rate) == (0, 0.01)

    def test_cost_of_unsampled_steps(self) -> None:
        """When unsampled steps alone use up the budget, measuring goes on at a tenth of it."""
        sampler = StepSampler(1.0, 0.01)
        sampled_s = time_s = 0.0
        for step in range(60_000):
            sampled = sampler.next_step()
            sampler.record(0.002 if sampled else 0.0005, 0.01, sampled)
            if step > 5000:
                sampled_s += 0.002 * sampled
                time_s += 0.01
        assert 0.01 / 40 <= sampled_s / time_s <= 0.01 / 10

    def test_set_budget(self) -> None:
        """A budget can be set and lifted while running; lifted, the sample rate holds at once."""
        server = Server(1.0, None, constant(0.008), constant(0.002))
        server.run(100)
        assert server.sampler.effective_rate == 1.0
        server.sampler.set_budget(0.01)
        assert server.sampler.effective_rate <= 0.05
        server.sampler.set_budget(None)
        assert server.sampler.effective_rate == 1.0

    def test_set_rate(self) -> None:
        """A new rate holds from the next step, and is throttled by what is known of the costs."""
        server = Server(0.01, 0.01, constant(0.008), constant(0.002))
        server.run(1000)
        server.sampler.set_rate(1.0)
        assert server.sampler.effective_rate <= 0.05
        server.sampler.set_rate(0.0)
        assert server.run(1000) == 0.0

    @pytest.mark.parametrize(("overhead_s", "step_s"), [(0.0, 0.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, math.nan)])
    def test_senseless_times(self, overhead_s: float, step_s: float) -> None:
        """A clock that stands still or runs back changes nothing."""
        sampler = StepSampler(1.0, 0.01)
        sampler.record(overhead_s, step_s, True)
        assert sampler.effective_rate == 1.0


def fixed_positions(prompt_len: int, rows: int) -> set[int]:
    """The prompt positions to measure, from the definition in exact integers."""
    if prompt_len <= rows:
        return set(range(prompt_len))
    return {-(-(k + 1) * prompt_len // rows) - 1 for k in range(rows)}


def brute_force(
    batch: list[tuple[int, int, int]],
    prefill_rows: int,
    new_from: list[int] | None = None,
    num_drafts: list[int] | None = None,
) -> list[tuple[int, int, int, int]]:
    """All candidates (query, row, phase, prompt length) of (scheduled, computed, prompt length) requests."""
    candidates = []
    query = 0
    for row, (scheduled, computed, prompt_len) in enumerate(batch):
        for offset in range(scheduled):
            position = computed + offset
            wanted = position >= prompt_len or position in fixed_positions(prompt_len, prefill_rows)
            if new_from is not None:
                wanted &= position >= new_from[row]
            if num_drafts is not None and position >= prompt_len:
                wanted &= offset < scheduled - num_drafts[row]
            if wanted:
                candidates.append((query + offset, row, int(position >= prompt_len), prompt_len))
        query += scheduled
    return candidates


def select(sampler: RowSampler, batch: list[tuple[int, int, int]], **marks: Any) -> tuple[np.ndarray, int]:
    columns = np.array(batch, dtype=np.int32).reshape(-1, 3)
    query_start = np.concatenate([[0], np.cumsum(columns[:, 0])]).astype(np.int32)
    return sampler.select(columns[:, 0], columns[:, 1], columns[:, 2], query_start, **marks)


requests = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60), st.integers(1, 70)), max_size=12)


class TestRowSampler:
    @given(requests, st.integers(0, 20), st.data())
    @settings(max_examples=300, deadline=None)
    def test_candidates(self, batch: list[tuple[int, int, int]], prefill_rows: int, data: st.DataObject) -> None:
        """With room for all, the rows are exactly those of the definition, in the order of the tokens."""
        new_from = [data.draw(st.integers(0, 110)) for _ in batch]
        num_drafts = [data.draw(st.integers(0, max(0, min(n, at + n - length)))) for n, at, length in batch]
        rows, dropped = select(RowSampler(10_000, prefill_rows), batch, new_from=new_from, num_drafts=num_drafts)
        expected = brute_force(batch, prefill_rows, new_from, num_drafts)
        assert [tuple(row[:4]) for row in rows.tolist()] == expected
        assert dropped == 0
        assert rows.dtype == np.int32
        assert rows.shape == (len(expected), NUM_ROW_COLUMNS)

    @given(requests, st.integers(1, 6), st.integers(1, 8))
    @settings(max_examples=200, deadline=None)
    def test_limit(self, batch: list[tuple[int, int, int]], max_rows: int, repeats: int) -> None:
        """With less room, each step has max_rows candidates, and each has its turn as often as any, +-1."""
        sampler = RowSampler(max_rows, 8)
        expected = brute_force(batch, 8)
        turns = dict.fromkeys(expected, 0)
        for _ in range(repeats):
            rows, dropped = select(sampler, batch)
            assert len(rows) == min(max_rows, len(expected))
            assert dropped == len(expected) - len(rows)
            assert np.all(np.diff(rows[:, ROW_QUERY]) > 0)
            for row in rows.tolist():
                turns[tuple(row[:4])] += 1
        assert not turns or max(turns.values()) - min(turns.values()) <= 1

    @given(st.integers(1, 400), st.integers(0, 24), st.data())
    @settings(max_examples=200, deadline=None)
    def test_chunks(self, prompt_len: int, prefill_rows: int, data: st.DataObject) -> None:
        """However a prompt is cut into chunks, the same positions are measured, the last one among them."""
        sampler = RowSampler(10_000, prefill_rows)
        computed, seen = 0, []
        while computed < prompt_len:
            scheduled = data.draw(st.integers(1, prompt_len - computed))
            rows, _ = select(sampler, [(scheduled, computed, prompt_len)])
            seen += [computed + query for query in rows[:, ROW_QUERY].tolist()]
            computed += scheduled
        assert seen == sorted(fixed_positions(prompt_len, prefill_rows))
        assert prefill_rows == 0 or seen[-1] == prompt_len - 1
        assert len(seen) == min(prefill_rows, prompt_len)

    def test_empty_batch(self) -> None:
        """A step without requests has no rows."""
        rows, dropped = select(RowSampler(256, 8), [])
        assert (rows.shape, rows.dtype, dropped) == ((0, NUM_ROW_COLUMNS), np.int32, 0)

    def test_nothing_scheduled(self) -> None:
        """A padded batch row without tokens has no rows, in prefill and in decode."""
        assert len(select(RowSampler(256, 8), [(0, 0, 0), (0, 5, 9), (0, 20, 9)])[0]) == 0

    def test_one_row(self) -> None:
        """A decoding request gives its one token, with its prompt's length and without a slot."""
        rows, _ = select(RowSampler(256, 8), [(1, 20, 9)])
        assert rows.tolist() == [[0, 0, 1, 9, -1]]

    def test_first_decode_step(self) -> None:
        """The last prompt token is prefill; the first generated one, at position prompt_len, is decode."""
        sampler = RowSampler(256, 8)
        assert select(sampler, [(1, 8, 9)])[0][0, ROW_PHASE] == 0
        assert select(sampler, [(1, 9, 9)])[0][0, ROW_PHASE] == 1

    def test_resumed_request(self) -> None:
        """A preempted request computes its prompt and 4 generated tokens again; the fifth one alone is new."""
        rows, _ = select(RowSampler(256, 8), [(14, 0, 9)], new_from=[13])
        assert rows.tolist() == [[13, 0, 1, 9, -1]]

    def test_prompt_that_was_interrupted(self) -> None:
        """Of a prompt whose first 6 tokens are computed again, the others are measured, and no chunk of the former."""
        sampler = RowSampler(256, 9)
        assert select(sampler, [(4, 0, 9)], new_from=[6])[0].tolist() == []
        rows, _ = select(sampler, [(5, 4, 9)], new_from=[6])
        assert rows[:, ROW_QUERY].tolist() == [2, 3, 4]

    def test_drafts(self) -> None:
        """Of a step that verifies 3 drafts, the token before them is measured; they are not said to be left out."""
        rows, dropped = select(RowSampler(256, 8), [(4, 20, 9), (1, 30, 9)], num_drafts=[3, 0])
        assert rows[:, [ROW_QUERY, ROW_BATCH, ROW_PHASE]].tolist() == [[0, 0, 1], [4, 1, 1]]
        assert dropped == 0

    def test_steady_batch_shares_turns(self) -> None:
        """Of 1000 decoding requests with room for 256, after 125 steps each was measured 32 times."""
        sampler = RowSampler(256, 8)
        turns = np.zeros(1000, dtype=int)
        for _ in range(125):
            rows, dropped = select(sampler, [(1, 50, 10)] * 1000)
            assert dropped == 744
            turns[rows[:, ROW_BATCH]] += 1
        assert set(turns.tolist()) == {32}

    def test_deterministic(self) -> None:
        """Two ranks with the same batches choose the same rows."""
        batches = [[(1, 50 + i, 10)] * (20 + i) for i in range(30)]
        ranks = [RowSampler(7, 3), RowSampler(7, 3)]
        for batch in batches:
            first, second = (select(sampler, batch)[0].tolist() for sampler in ranks)
            assert first == second

    def test_long_prompts(self) -> None:
        """Prompts of millions of tokens don't overflow."""
        prompt_len = 10_000_000
        rows, _ = select(RowSampler(5000, 4096), [(prompt_len, 0, prompt_len)])
        assert rows[:, ROW_QUERY].tolist() == sorted(fixed_positions(prompt_len, 4096))


marked = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 60), st.integers(1, 70), st.booleans(), st.booleans()), max_size=12
)


class TestTracedRows:
    """Rows of traced requests come first, in every step, and don't change what the sample is."""

    def columns(self, batch: list[tuple[int, int, int, bool, bool]]) -> tuple[Any, np.ndarray, np.ndarray]:
        return [one[:3] for one in batch], *(np.array([one[i] for one in batch], dtype=bool) for i in (3, 4))

    @given(marked, st.booleans())
    @settings(max_examples=300, deadline=None)
    def test_with_room_for_all(self, batch: list[tuple[int, int, int, bool, bool]], sampled: bool) -> None:
        """A sampled step has all candidates, all of them counted; another one those of traced requests, uncounted."""
        plain, traced, excluded = self.columns(batch)
        traced &= ~excluded
        rows, dropped = select(RowSampler(10_000, 8), plain, traced=traced, excluded=excluded, sampled=sampled)
        uncounted = 0 if sampled else ROW_UNCOUNTED
        expected = [
            (query, row, phase | uncounted, prompt_len)
            for query, row, phase, prompt_len in brute_force(plain, 8)
            if not excluded[row] and (sampled or traced[row])
        ]
        assert [tuple(row[:4]) for row in rows.tolist()] == expected
        assert dropped == 0
        slots = rows[traced[rows[:, ROW_BATCH]], ROW_SLOT]
        assert slots.tolist() == list(range(len(slots))), "traced rows are numbered"
        assert (rows[~traced[rows[:, ROW_BATCH]], ROW_SLOT] == -1).all()

    @given(marked, st.integers(1, 30))
    @settings(max_examples=200, deadline=None)
    def test_limit(self, batch: list[tuple[int, int, int, bool, bool]], max_rows: int) -> None:
        """Never more than max_rows; all traced rows as long as they fit; what is left out is counted."""
        plain, traced, _ = self.columns(batch)
        rows, dropped = select(RowSampler(max_rows, 8), plain, traced=traced)
        candidates = brute_force(plain, 8)
        wanted = sum(bool(traced[row[1]]) for row in candidates)
        assert len(rows) <= max_rows
        assert dropped == len(candidates) - len(rows)
        assert (rows[:, ROW_SLOT] >= 0).sum() == min(wanted, max_rows)
        if wanted == 0:
            assert len(rows) == min(max_rows, len(candidates))

    @given(marked, st.integers(1, 30), st.integers(1, 10))
    @settings(max_examples=200, deadline=None)
    def test_limit_of_traced_rows(
        self, batch: list[tuple[int, int, int, bool, bool]], max_rows: int, max_traced: int
    ) -> None:
        """A ring has no more slots than it has; rows of traced requests that get none may still be in the sample."""
        plain, traced, _ = self.columns(batch)
        sampler = RowSampler(max_rows, 8, max_traced_rows=max_traced)
        for _ in range(3):
            rows, dropped = select(sampler, plain, traced=traced)
            candidates = brute_force(plain, 8)
            wanted = sum(bool(traced[row[1]]) for row in candidates)
            slots = rows[rows[:, ROW_SLOT] >= 0]
            assert slots[:, ROW_SLOT].tolist() == list(range(min(wanted, max_rows, max_traced)))
            assert traced[slots[:, ROW_BATCH]].all()
            assert len(rows) <= max_rows
            assert dropped == len(candidates) - len(rows)
            assert ((rows[:, ROW_PHASE] & ROW_UNCOUNTED == 0) | (rows[:, ROW_SLOT] >= 0)).all()

    def test_drafts_are_for_traces_alone(self) -> None:
        """A traced request's drafts are measured, uncounted; the sample has the tokens before them, as anyone's."""
        batch, traced = [(4, 20, 9), (4, 30, 9)], np.array([True, False])
        rows, dropped = select(RowSampler(256, 8), batch, num_drafts=[3, 3], traced=traced)
        draft = ROW_DECODE | ROW_UNCOUNTED
        expected = [[0, ROW_DECODE, 0], [1, draft, 1], [2, draft, 2], [3, draft, 3], [4, ROW_DECODE, -1]]
        assert rows[:, [ROW_QUERY, ROW_PHASE, ROW_SLOT]].tolist() == expected
        assert dropped == 0

    def test_drafts_without_room(self) -> None:
        """Those that are left out are not among the rows that should have been measured."""
        batch, traced = [(4, 20, 9), (1, 30, 9)], np.array([True, False])
        rows, dropped = select(RowSampler(2, 8), batch, num_drafts=[3, 0], traced=traced)
        certain = {0, 4}
        assert dropped == 2 - len(certain & set(rows[:, ROW_QUERY].tolist()))
        assert len(rows) == 2

    def test_the_sample_stays_fair(self) -> None:
        """Of 100 requests of which 10 are traced, each is counted as often as any other."""
        sampler = RowSampler(30, 8)
        traced = np.arange(100) < 10
        turns = np.zeros(100, dtype=int)
        for _ in range(50):
            rows, _ = select(sampler, [(1, 50, 10)] * 100, traced=traced)
            assert set(range(10)) <= set(rows[:, ROW_BATCH].tolist()), "traced ones are in every step"
            turns[rows[(rows[:, ROW_PHASE] & ROW_UNCOUNTED) == 0, ROW_BATCH]] += 1
        assert set(turns.tolist()) == {10}

    def test_more_traced_rows_than_room(self) -> None:
        """They take turns, and nothing else is measured."""
        sampler = RowSampler(4, 8)
        turns = np.zeros(8, dtype=int)
        for _ in range(6):
            rows, dropped = select(sampler, [(1, 50, 10)] * 10, traced=np.arange(10) < 8)
            assert (len(rows), dropped) == (4, 6)
            turns[rows[:, ROW_BATCH]] += 1
        assert set(turns.tolist()) == {3}

    def test_a_step_without_traced_requests_is_as_before(self) -> None:
        """Marks that mark nothing change nothing."""
        batch = [(1, 50, 10)] * 10
        nobody = np.zeros(10, dtype=bool)
        plain, marks = RowSampler(4, 8), RowSampler(4, 8)
        for _ in range(5):
            expected, _ = select(plain, batch)
            np.testing.assert_array_equal(expected, select(marks, batch, traced=nobody, excluded=nobody)[0])
