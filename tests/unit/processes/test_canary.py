"""The canary: when and which rows are checked, what follows from a check, and what the observer makes of it."""

import logging
import threading
from collections import Counter
from typing import Any, Final

import numpy as np
import pytest

from glassbox.adapter.runner import Batch
from glassbox.core.output_checks import (
    ERROR_RATIO_BUCKETS,
    KV_SUM,
    KV_SUMS,
    NONFINITE_BOTH,
    NONFINITE_OUTPUT,
    OUTPUT_SUM,
    OUTPUT_SUMS,
    LayerState,
)
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
from glassbox.measure.contract import CheckedLayers, CheckLimits
from glassbox.processes.worker.canary import Canary, StepCheck
from tests.canaries import make_place
from tests.export_samples import logged
from tests.unit.processes.test_observer import DECODE, LAYERS, NUM_HEADS, PREFILL, Clock, Setup

HEADS: Final = 2
ALL: Final = frozenset({0, 1, 2})
NO_ROWS: Final = np.zeros((0, NUM_ROW_COLUMNS), dtype=np.int32)
INTERVAL_S: Final = 30.0


def make_batch(*requests: tuple[int, int, int]) -> Batch:
    """Of (scheduled, computed, prompt length) requests."""
    scheduled, computed, prompt = (np.array(column, dtype=np.int32) for column in zip(*requests, strict=True))
    starts = np.concatenate([[0], np.cumsum(scheduled)]).astype(np.int32)
    return Batch(scheduled, computed, prompt, starts, tuple(f"request-{i}" for i in range(len(requests))))


PREFILL_STEP: Final = make_batch((6, 0, 6))
DECODE_STEP: Final = make_batch((1, 9, 7))


def sums_of(rows: int, layers: int, heads: int = HEADS, **columns: float) -> np.ndarray:
    """Sums of a check in which all is well, but for these columns."""
    sums = np.zeros((rows, layers, heads, len(OUTPUT_SUMS)), dtype=np.float32)
    for name, value in {"worst": 0.15, "error2": 1e-7, "noise2": 1e-7, "norm2": 1.0, **columns}.items():
        sums[..., OUTPUT_SUM[name]] = value
    return sums


def checked(local_layers: list[int], sums: np.ndarray, kv_sums: np.ndarray | None = None) -> CheckedLayers:
    """What a measurer found in a bfloat16 layer."""
    return CheckedLayers(local_layers, sums, kv_sums, head_size=64, roundoff=2.0**-8)


class Checks:
    """A canary of layers 4, 5 and 6, whose first head is head 10; its clock and what it counts."""

    def __init__(self, *, probation: bool = False, rows: int = 8, keys: int = 1000) -> None:
        self.clock = Clock()
        self.counts: Counter[str] = Counter()
        self.canary = Canary(
            make_place((4, 5, 6), head_offset=10),
            CheckLimits(rows, keys),
            probation=probation,
            count=lambda result, rows: self.counts.update({result: rows}),
            clock=self.clock,
        )

    def is_due(self, interval_s: float = INTERVAL_S, layers: frozenset[int] = ALL) -> bool:
        return self.canary.is_due(interval_s, layers)

    def choose(
        self, batch: Batch, rows: np.ndarray = NO_ROWS, *, interval_s: float = INTERVAL_S, room: int = 1000, **kw: Any
    ) -> tuple[np.ndarray, StepCheck | None]:
        return self.canary.choose(batch, rows, interval_s, room=room, **kw)

    def step(self, batch: Batch, interval_s: float = INTERVAL_S, layers: frozenset[int] = ALL) -> StepCheck | None:
        """One that is looked at if it is due; 10 ms long."""
        self.clock.now += 0.01
        return self.choose(batch, interval_s=interval_s)[1] if self.is_due(interval_s, layers) else None

    def conclude(self, *found: CheckedLayers, batch: Batch = DECODE_STEP) -> None:
        """A check of a step is computed."""
        rows = found[0].sums.shape[0]
        phases = np.full(rows, ROW_DECODE if batch is DECODE_STEP else 0)
        check = StepCheck(self.canary, np.arange(rows), np.arange(rows, dtype=np.int32), phases, ALL)
        for layers in found:
            check.add(layers)
        check.commit()

    @property
    def states(self) -> list[int]:
        return self.canary.checks().state.tolist()


class TestPace:
    def test_first_prefill_and_first_decode(self) -> None:
        """Both are checked, and then nothing more until the interval is over."""
        checks = Checks()
        assert checks.step(PREFILL_STEP) is not None
        assert checks.step(DECODE_STEP) is not None
        assert not any(checks.step(batch) for batch in (PREFILL_STEP, DECODE_STEP) * 20)
        checks.clock.now += INTERVAL_S
        assert checks.step(DECODE_STEP) is not None
        assert checks.step(PREFILL_STEP) is None

    def test_a_phase_that_was_checked(self) -> None:
        """While the other one is missing, its steps are looked at, but not checked."""
        checks = Checks()
        assert [checks.step(PREFILL_STEP) is not None for _ in range(4)] == [True, False, False, False]
        assert checks.step(DECODE_STEP) is not None

    def test_patience(self) -> None:
        """A phase that does not come (a model that generates nothing): one look a second, checks by the interval."""
        checks = Checks()
        looks, found = [], []
        for _ in range(12_000):
            checks.clock.now += 0.01
            if checks.is_due():
                looks.append(checks.clock.now)
                found += [looks[-1]] if checks.choose(PREFILL_STEP)[1] else []
        assert len(looks) == pytest.approx(8 + 120, abs=3)
        assert np.diff(looks[10:]).min() > 0.99
        assert np.diff(found) == pytest.approx(INTERVAL_S, abs=1.1)
        checks.clock.now += 2
        assert checks.step(DECODE_STEP) is not None, "it comes after all"

    def test_interval_0(self) -> None:
        """First prefill, first decode, and never again."""
        checks = Checks()
        checks.step(PREFILL_STEP, 0.0)
        checks.conclude(checked([0, 1, 2], sums_of(1, 3)))
        assert checks.step(DECODE_STEP, 0.0) is not None
        checks.clock.now += 1e6
        assert not checks.is_due(0.0)

    def test_interval_0_and_a_phase_that_does_not_come(self) -> None:
        """What was checked is not checked again; a look a second goes on."""
        checks = Checks()
        checks.step(PREFILL_STEP, 0.0)
        checks.conclude(checked([0, 1, 2], sums_of(1, 3)))
        checks.clock.now += 1e6
        assert [None] * 20 == [checks.step(PREFILL_STEP, 0.0) for _ in range(20)]
        checks.clock.now += 2
        assert checks.step(DECODE_STEP, 0.0) is not None

    def test_interval_0_and_a_check_that_failed(self) -> None:
        """Layers of which nothing was found are tried again, after half a minute."""
        checks = Checks()
        checks.step(PREFILL_STEP, 0.0)
        checks.step(DECODE_STEP, 0.0)
        assert not checks.is_due(0.0)
        checks.clock.now += 31
        assert checks.step(DECODE_STEP, 0.0) is not None
        checks.conclude(checked([0, 1, 2], sums_of(1, 3)))
        checks.clock.now += 31
        assert not checks.is_due(0.0)

    def test_an_edit_of_the_interval(self) -> None:
        """It counts from the last check on."""
        checks = Checks()
        checks.step(PREFILL_STEP, 3600.0)
        checks.step(DECODE_STEP, 3600.0)
        checks.clock.now += 10
        assert not checks.is_due(3600.0)
        assert checks.is_due(5.0)

    def test_layers_that_are_new(self) -> None:
        """`sampling.layers` was edited: they have their first prefill and decode, too."""
        checks = Checks()
        for batch in (PREFILL_STEP, DECODE_STEP):
            check = checks.step(batch, 0.0, frozenset({1}))
            assert check is not None
            assert {1} == check.local_layers
        checks.conclude(checked([1], sums_of(1, 1)))
        assert not checks.is_due(0.0, frozenset({1}))
        check = checks.step(PREFILL_STEP, 0.0, frozenset({1, 2}))
        assert check is not None
        assert {1, 2} == check.local_layers
        assert checks.step(DECODE_STEP, 0.0, frozenset({2})) is not None

    def test_no_layers(self) -> None:
        """Nothing to check, and no row list for it."""
        checks = Checks()
        assert checks.step(PREFILL_STEP, INTERVAL_S, frozenset()) is None


def rows_of(batch: Batch, *queries: int, phase: int = 0, slots: tuple[int, ...] = ()) -> np.ndarray:
    """A row list with these of the step's tokens, of a batch of one token for each request."""
    rows = np.zeros((len(queries), NUM_ROW_COLUMNS), dtype=np.int32)
    rows[:, ROW_QUERY] = rows[:, ROW_BATCH] = queries
    rows[:, ROW_PHASE], rows[:, ROW_PROMPT_LEN] = phase, batch.prompt_len[list(queries)]
    rows[:, ROW_SLOT] = slots or -1
    return rows


class TestRows:
    def test_entries(self) -> None:
        """A row of the prompt and a generated one, marked as no part of the sample."""
        joined, check = Checks().choose(make_batch((1, 5, 6), (1, 9, 7)))
        assert check is not None
        columns = [ROW_QUERY, ROW_BATCH, ROW_PHASE, ROW_PROMPT_LEN, ROW_SLOT]
        expected = [[0, 0, ROW_UNCOUNTED, 6, -1], [1, 1, ROW_DECODE | ROW_UNCOUNTED, 7, -1]]
        assert expected == joined[:, columns].tolist()
        assert ([0, 1], [5, 9], [0, ROW_DECODE]) == tuple(
            x.tolist() for x in (check.places, check.positions, check.phases)
        )

    def test_spread_over_a_chunk(self) -> None:
        """Evenly over a request's rows, the last one included; positions are those of the sequence."""
        joined, check = Checks(rows=4).choose(make_batch((20, 100, 300)))
        assert check is not None
        assert [104, 109, 114, 119] == check.positions.tolist()
        assert [4, 9, 14, 19] == joined[:, ROW_QUERY].tolist()

    def test_several_requests_share(self) -> None:
        """Each has as many as the others."""
        _, check = Checks(rows=8).choose(make_batch((10, 0, 10), (10, 5, 15), (10, 0, 40)))
        assert check is not None
        assert [4, 9, 9, 14, 4, 9] == check.positions.tolist()

    def test_at_most_so_many(self) -> None:
        """Of 20 requests eight, and in the next check the ones that follow."""
        checks = Checks()
        batch = make_batch(*[(1, 9, 7)] * 20)
        seen: Counter[int] = Counter()
        for _ in range(20):
            checks.clock.now += INTERVAL_S
            joined, check = checks.choose(batch)
            assert check is not None
            assert 8 == len(check.places)
            seen.update(joined[:, ROW_BATCH].tolist())
        assert {8} == set(seen.values()), "each has had its turn as often"

    def test_keys(self) -> None:
        """No more keys than the limit, but one row whatever it sees."""
        checks = Checks(keys=1000)
        batch = make_batch((1, 5000, 10), (1, 499, 10), (1, 499, 10), (1, 499, 10))
        positions = []
        for _ in range(4):
            checks.clock.now += INTERVAL_S
            _, check = checks.choose(batch)
            assert check is not None
            positions.append(check.positions.tolist())
        assert [[5000], [499, 499], [499, 499], [499, 499]] == positions

    def test_a_phase_that_is_missing_comes_first(self) -> None:
        """Twenty prompts do not keep the one request that generates from being checked."""
        checks = Checks()
        assert checks.step(PREFILL_STEP) is not None
        check = checks.step(make_batch(*[(3, 0, 3)] * 20, (1, 9, 7)))
        assert check is not None
        assert ROW_DECODE in check.phases

    def test_rows_that_are_in_the_list(self) -> None:
        """They are checked as they are, sampled or traced, and are not listed twice."""
        batch = make_batch(*[(1, 9, 7)] * 4)
        listed = rows_of(batch, 1, 2, phase=ROW_DECODE, slots=(-1, 0))
        joined, check = Checks().choose(batch, listed)
        assert check is not None
        assert [0, 1, 2, 3] == joined[:, ROW_QUERY].tolist() == check.places.tolist()
        uncounted = ROW_DECODE | ROW_UNCOUNTED
        assert [uncounted, ROW_DECODE, ROW_DECODE, uncounted] == joined[:, ROW_PHASE].tolist()
        assert [-1, -1, 0, -1] == joined[:, ROW_SLOT].tolist()

    def test_places_behind_other_rows(self) -> None:
        """Where the checked rows stand in a list with others between them."""
        batch = make_batch((20, 0, 20))
        listed = np.zeros((4, NUM_ROW_COLUMNS), dtype=np.int32)
        listed[:, ROW_QUERY] = (0, 3, 9, 12)
        joined, check = Checks(rows=2).choose(batch, listed)
        assert check is not None
        assert [0, 3, 9, 12, 19] == joined[:, ROW_QUERY].tolist()
        assert [2, 4] == check.places.tolist()

    def test_room(self) -> None:
        """Without room only rows of the list are checked; without those nothing is, and it is tried again."""
        batch = make_batch(*[(1, 9, 7)] * 4)
        checks = Checks()
        joined, check = checks.choose(batch, room=0)
        assert (0, None) == (len(joined), check)
        listed = rows_of(batch, 2, phase=ROW_DECODE)
        assert checks.is_due()
        joined, check = checks.choose(batch, listed, room=0)
        assert check is not None
        assert (1, [0]) == (len(joined), check.places.tolist())
        checks.clock.now += INTERVAL_S
        joined, check = checks.choose(batch, listed, room=2)
        assert check is not None
        assert (3, 3) == (len(joined), len(check.places))

    def test_excluded_requests(self) -> None:
        """A request that wants to be left out is not looked at, even if it is the only one."""
        batch = make_batch((1, 9, 7), (1, 9, 7))
        joined, check = Checks().choose(batch, excluded=np.array([True, False]))
        assert check is not None
        assert [1] == joined[:, ROW_BATCH].tolist()
        assert Checks().choose(batch, excluded=np.array([True, True]))[1] is None

    def test_requests_without_tokens(self) -> None:
        """One of which nothing is computed has no row."""
        joined, check = Checks().choose(make_batch((0, 9, 7), (1, 9, 7)))
        assert check is not None
        assert [1] == joined[:, ROW_BATCH].tolist()


class TestTokens:
    """Of latent attention only the first tokens of a step can be reproduced."""

    BATCH = make_batch((1, 9, 7), (1, 20, 4), (6, 4, 5))

    def test_rows_of_later_tokens(self) -> None:
        """They are left out whatever their phase, a resumed request's answer among them; the first ones are checked."""
        checks = Checks()
        checks.is_due()
        rows, check = checks.choose(self.BATCH, tokens=2)
        assert check is not None
        assert rows[:, ROW_QUERY].tolist() == [0, 1]
        assert check.positions.tolist() == [9, 20]
        assert (check.phases == ROW_DECODE).all()

    def test_none(self) -> None:
        """A step that only prefills is not checked, and stands for no phase."""
        checks = Checks()
        checks.is_due()
        rows, check = checks.choose(self.BATCH, tokens=0)
        assert check is None
        assert not len(rows)
        assert checks.choose(self.BATCH)[1] is not None


class TestSlots:
    def test_behind_those_of_traced_rows(self) -> None:
        """Each checked row has one: a traced one keeps its own, the others follow the last."""
        batch = make_batch(*[(1, 9, 7)] * 4)
        joined, check = Checks().choose(batch, rows_of(batch, 1, 2, phase=ROW_DECODE, slots=(1, 0)))
        assert check is not None
        check.take_slots(joined, 100)
        assert [2, 1, 0, 3] == joined[:, ROW_SLOT].tolist()

    def test_more_than_there_are(self) -> None:
        """Rows without one are not checked, and stay in the list."""
        batch = make_batch(*[(1, 9, 7)] * 4)
        joined, check = Checks().choose(batch, rows_of(batch, 3, phase=ROW_DECODE, slots=(0,)))
        assert check is not None
        check.take_slots(joined, 3)
        assert [1, 2, -1, 0] == joined[:, ROW_SLOT].tolist()
        assert ([0, 1, 3], 3, 3) == (check.places.tolist(), len(check.positions), len(check.phases))


class TestStanding:
    def test_before_the_first_check(self) -> None:
        """A tested vLLM's layers are observed from the start, an unknown one's are not."""
        assert ALL == Checks().canary.allowed
        assert {} == Checks().canary.not_observed()
        unknown = Checks(probation=True)
        assert frozenset() == unknown.canary.allowed
        assert {"not_certified": 3} == unknown.canary.not_observed()
        assert [LayerState.PENDING] * 3 == unknown.states

    @pytest.mark.parametrize("probation", [False, True])
    def test_certified(self, probation: bool, caplog: pytest.LogCaptureFixture) -> None:
        """Layer by layer, as checks come; nothing is said of a tested vLLM."""
        checks = Checks(probation=probation)
        checks.conclude(checked([0, 2], sums_of(2, 2)))
        assert [LayerState.CERTIFIED, LayerState.PENDING, LayerState.CERTIFIED] == checks.states
        assert ({0, 2} if probation else ALL) == checks.canary.allowed
        assert ({"not_certified": 1} if probation else {}) == checks.canary.not_observed()
        assert [] == logged(caplog.records)
        checks.conclude(checked([1], sums_of(2, 1)))
        assert ALL == checks.canary.allowed
        assert {"reproduced": 6} == checks.counts
        said = ["vLLM 0.99.0 is not among the tested ones; 3 of 3 layers reproduced"] if probation else []
        assert said == logged(caplog.records)

    @pytest.mark.parametrize("probation", [False, True])
    def test_failed(self, probation: bool, caplog: pytest.LogCaptureFixture) -> None:
        """It is not observed any more, is counted, and named: place, layer, what differed and by how much."""
        checks = Checks(probation=probation)
        sums = sums_of(2, 3)
        sums[1, 1, 1, OUTPUT_SUM["worst"]] = 37.0
        checks.conclude(checked([0, 1, 2], sums))
        assert [LayerState.CERTIFIED, LayerState.FAILED, LayerState.CERTIFIED] == checks.states
        assert {0, 2} == checks.canary.allowed
        assert {"not_reproduced": 1} == checks.canary.not_observed()
        assert {"reproduced": 4, "failed": 2} == checks.counts
        found = checks.canary.checks()
        assert (37.0, 11) == (found.worst_ratio[1], found.worst_head[1])
        assert logged([record for record in caplog.records if record.levelno == logging.ERROR]) == [
            "The served output of layer 5 (model.layers.5.self_attn.attn) is not what its keys and values give, so "
            "it is not observed any more: row error 37 times what rounding in bfloat16 explains, in head 1. Rank 0, "
            "whose first head is 10, on here, vLLM 0.99.0; serving is untouched (docs/runbooks, GlassboxOutputWrong)"
        ]
        if probation:
            assert "2 of 3 layers reproduced, the others are not observed" in caplog.text

    @pytest.mark.parametrize(("layers", "others"), [(2, ", as is 1 other: "), (3, ", as are 2 others: ")])
    def test_several_at_once(self, layers: int, others: str, caplog: pytest.LogCaptureFixture) -> None:
        """One line, of the worst."""
        checks = Checks()
        sums = sums_of(1, layers, worst=3.0)
        sums[0, 1, 0, OUTPUT_SUM["worst"]] = 8.0
        checks.conclude(checked(list(range(layers)), sums))
        (said,) = logged(caplog.records)
        assert said.startswith("The served output of layer 5 (model.layers.5.self_attn.attn) is not what its keys")
        assert others in said
        assert "row error 8 times" in said

    @pytest.mark.parametrize("probation", [False, True])
    def test_never_again(self, probation: bool, caplog: pytest.LogCaptureFixture) -> None:
        """A layer that has failed stays failed, is still checked and counted, and not named a second time."""
        checks = Checks(probation=probation)
        checks.conclude(checked([0], sums_of(1, 1)))
        checks.conclude(checked([0], sums_of(1, 1, worst=2.0)))
        checks.conclude(checked([0], sums_of(1, 1)))
        assert LayerState.FAILED == checks.states[0]
        assert 0 < checks.canary.checks().worst_ratio[0] < 1, "whoever looks sees that it is well now"
        checks.conclude(checked([0], sums_of(1, 1, worst=3.0)))
        assert {"reproduced": 2, "failed": 2} == checks.counts
        assert 1 == len([message for message in logged(caplog.records) if "served output of layer 4" in message])
        assert 0 not in checks.canary.allowed

    def test_layers_that_nobody_asked_for(self, caplog: pytest.LogCaptureFixture) -> None:
        """On an unknown vLLM, those that `sampling.layers` leaves out are not waited for."""
        checks = Checks(probation=True)
        checks.step(PREFILL_STEP, layers=frozenset({0, 1}))
        assert {"not_certified": 2} == checks.canary.not_observed()
        checks.conclude(checked([0, 1], sums_of(1, 2)))
        assert {} == checks.canary.not_observed()
        assert {0, 1} == checks.canary.allowed
        assert logged(caplog.records) == ["vLLM 0.99.0 is not among the tested ones; 2 of 2 layers reproduced"]

    def test_histogram(self) -> None:
        """Of a row the ratio of its worst head, by phase; a bucket holds its upper bound."""
        checks = Checks()
        sums = sums_of(3, 1)
        sums[:, 0, 0, OUTPUT_SUM["worst"]] = (0.5, 0.51, 1.5)
        checks.conclude(checked([2], sums))
        checks.conclude(checked([2], sums_of(1, 1)), batch=PREFILL_STEP)
        found = checks.canary.checks()
        bounds = [*ERROR_RATIO_BUCKETS, np.inf]
        counts = {
            phase: {bounds[bucket]: int(found.error_counts[2, phase, bucket]) for bucket in np.flatnonzero(of_phase)}
            for phase, of_phase in enumerate(found.error_counts[2])
        }
        assert {0: {0.2: 1}, 1: {0.5: 1, 0.7: 1, 2.0: 1}} == counts
        assert [pytest.approx(0.15), pytest.approx(2.51)] == found.error_sums[2].tolist()
        assert not found.error_counts[:2].any()


class TestRowsThatSayNothing:
    def test_not_finite_at_all(self) -> None:
        """Neither output nor reference: another layer spoiled them; they are no verdict and no rows."""
        checks = Checks(probation=True)
        nothing = dict.fromkeys(("worst", "error2", "noise2", "norm2"), 0.0)
        checks.conclude(checked([0], sums_of(2, 1, **nothing, nonfinite=NONFINITE_BOTH)))
        assert LayerState.PENDING == checks.states[0]
        assert {} == checks.counts
        assert np.isnan(checks.canary.checks().worst_ratio[0])

    def test_some_of_them(self) -> None:
        """The other rows are judged, and counted alone."""
        checks = Checks()
        sums = sums_of(3, 1)
        sums[1] = 0
        sums[1, ..., OUTPUT_SUM["nonfinite"]] = NONFINITE_BOTH
        checks.conclude(checked([0], sums))
        assert LayerState.CERTIFIED == checks.states[0]
        assert {"reproduced": 2} == checks.counts
        assert 2 == checks.canary.checks().error_counts[0].sum()

    def test_output_that_is_not_finite(self, caplog: pytest.LogCaptureFixture) -> None:
        """From keys and values that are: that is a fault, and sums stay finite."""
        checks = Checks()
        sums = sums_of(2, 1)
        sums[0, 0] = 0
        sums[0, 0, :, OUTPUT_SUM["nonfinite"]] = NONFINITE_OUTPUT
        checks.conclude(checked([1], sums))
        assert LayerState.FAILED == checks.states[1]
        assert {"failed": 2} == checks.counts
        found = checks.canary.checks()
        assert np.isinf(found.worst_ratio[1])
        assert np.isfinite(found.error_sums).all()
        assert "head 0's output is not finite where its keys and values give a finite one" in caplog.text

    def test_outputs_of_0(self) -> None:
        """Values that are all 0 are reproduced by anything that multiplies them."""
        checks = Checks()
        checks.conclude(checked([0], sums_of(2, 1, norm2=0.0, error2=0.0, worst=0.0)))
        assert LayerState.PENDING == checks.states[0]


class TestCache:
    def test_error_and_saturation(self) -> None:
        """Relative to what was computed, over rows and KV heads; of keys and of values."""
        checks = Checks()
        kv_sums = np.zeros((2, 1, 3, len(KV_SUMS)), dtype=np.float32)
        kv_sums[..., KV_SUM["key_error2"]], kv_sums[..., KV_SUM["key_norm2"]] = 0.04, 4.0
        kv_sums[..., KV_SUM["value_error2"]], kv_sums[..., KV_SUM["value_norm2"]] = 0.0, 4.0
        kv_sums[0, 0, 0, KV_SUM["value_saturated"]] = 32
        checks.conclude(checked([1], sums_of(2, 1), kv_sums))
        found = checks.canary.checks()
        assert [pytest.approx(0.1), 0.0] == found.kv_error[1].tolist()
        assert [0.0, pytest.approx(32 / (2 * 3 * 64))] == found.kv_saturated[1].tolist()
        assert np.isnan(found.kv_error[[0, 2]]).all()

    def test_not_given(self) -> None:
        """A step whose K and V were not told says nothing of the cache, and takes nothing back."""
        checks = Checks()
        kv_sums = np.ones((1, 1, 3, len(KV_SUMS)), dtype=np.float32)
        checks.conclude(checked([1], sums_of(1, 1), kv_sums))
        checks.conclude(checked([1], sums_of(1, 1)))
        assert (1.0, 1.0) == tuple(checks.canary.checks().kv_error[1])

    @pytest.mark.parametrize("norm2", [0.0, np.nan])
    def test_nothing_to_compare(self, norm2: float) -> None:
        """Keys of 0, or that are not finite: unknown."""
        checks = Checks()
        kv_sums = np.full((1, 1, 3, len(KV_SUMS)), norm2, dtype=np.float32)
        checks.conclude(checked([1], sums_of(1, 1), kv_sums))
        assert np.isnan(checks.canary.checks().kv_error[1]).all()


class TestThreads:
    def test_concluded_elsewhere(self) -> None:
        """A GPU's checks end on the thread of snapshots: no row is lost, and copies are whole."""
        checks = Checks()
        stop = threading.Event()
        torn: list[Any] = []

        def read() -> None:
            while not stop.is_set():
                rows = checks.canary.checks().error_counts.sum((1, 2))
                torn.extend([rows] if (rows % 4).any() or len(set(rows)) > 1 else [])

        reader = threading.Thread(target=read)
        writers = [
            threading.Thread(target=lambda: [checks.conclude(checked([0, 1, 2], sums_of(4, 3))) for _ in range(50)])
            for _ in range(3)
        ]
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        reader.join()
        assert [] == torn
        assert [600] * 3 == checks.canary.checks().error_counts.sum((1, 2)).tolist()
        assert {"reproduced": 1800} == checks.counts


class Observed(Setup):
    """The observer with a canary of its own, whose checks end with `conclude`."""

    def __init__(self, *, probation: bool = False, **config: Any) -> None:
        self.canary_clock = Clock()
        self.canary = Canary(make_place(LAYERS), CheckLimits(8, 1000), probation=probation, clock=self.canary_clock)
        super().__init__(self.canary, **config)

    def conclude(self, *failed: int) -> None:
        """The last step's check was computed: all layers are reproduced, but these."""
        check = self.measurer.check
        sums = sums_of(len(check.places), len(LAYERS), NUM_HEADS)
        sums[:, list(failed), ..., OUTPUT_SUM["worst"]] = 9.0
        check.add(checked(list(range(len(LAYERS))), sums))
        check.commit()


EVERY: Final = frozenset(range(len(LAYERS)))


class TestObserver:
    def test_a_sampled_step(self) -> None:
        """Its rows are the sample's, and of the checked ones that are not in it nothing is counted."""
        setup = Observed(sampling={"prefill_rows_per_request": 1})
        setup.step([PREFILL])
        (rows,) = setup.measurer.rows
        assert [0, 1, 2, 3, 4, 5] == rows[:, ROW_QUERY].tolist()
        assert [ROW_UNCOUNTED] * 5 + [0] == rows[:, ROW_PHASE].tolist()
        assert [EVERY] == setup.measurer.layers
        assert list(range(6)) == rows[setup.measurer.check.places, ROW_SLOT].tolist()
        assert {} == setup.observer.counters.dropped_rows

    def test_an_unsampled_step(self) -> None:
        """It is listened to and checked, and the accumulators get none of its rows."""
        setup = Observed(sample_rate=0.0)
        setup.step([PREFILL])
        (rows,) = setup.measurer.rows
        assert (rows[:, ROW_PHASE] & ROW_UNCOUNTED).all()
        assert [frozenset()] == setup.measurer.layers
        assert EVERY == setup.measurer.check.local_layers
        assert [True, False] == setup.listening[-2:]
        counters = setup.observer.counters
        assert (1, 0, {}) == (counters.steps, counters.sampled_steps, counters.dropped_rows)

    def test_steps_between_two_checks(self) -> None:
        """They are vLLM's own where nothing is sampled."""
        setup = Observed(sample_rate=0.0)
        setup.step([PREFILL])
        setup.step([DECODE])
        setup.listening.clear()
        setup.step([DECODE])
        assert [] == setup.listening
        setup.canary_clock.now += 30
        setup.step([DECODE])
        assert 3 == setup.measurer.calls.count("begin")

    def test_disabled(self) -> None:
        """`enabled: false` checks nothing either."""
        setup = Observed(enabled=False)
        setup.step([PREFILL])
        assert [] == setup.measurer.rows

    def test_layers_of_the_sample(self) -> None:
        """Only those that are measured are checked."""
        setup = Observed(sampling={"layers": [1, 3]})
        setup.step([PREFILL])
        assert {1, 3} == setup.measurer.check.local_layers
        assert [frozenset({1, 3})] == setup.measurer.layers

    def test_a_layer_that_failed(self) -> None:
        """It is measured no more and goes on being checked, in steps whose sample the others keep."""
        setup = Observed()
        setup.step([DECODE])
        setup.conclude(2)
        setup.step([DECODE])
        assert {0, 1, 3} == setup.measurer.layers[-1]
        setup.canary_clock.now += 30
        setup.step([DECODE, DECODE])
        assert {0, 1, 3} == setup.measurer.layers[-1]
        assert EVERY == setup.measurer.check.local_layers
        assert [(2, {0, 1, 3})] == [(len(one.counted), one.local_layers) for one in setup.measurer.lists[-1]]

    def test_probation(self) -> None:
        """No layer is measured before it was reproduced; the next step after that has its rows."""
        setup = Observed(probation=True)
        setup.step([PREFILL])
        assert [frozenset()] == setup.measurer.layers
        assert setup.measurer.check is not None
        setup.conclude(0)
        setup.step([DECODE])
        assert EVERY == setup.measurer.check.local_layers, "the first decode"
        assert {1, 2, 3} == setup.measurer.layers[-1]
        assert {} == setup.observer.counters.dropped_rows

    def test_a_traced_request(self) -> None:
        """Its rows are checked with slots of their own, and it hears nothing of a layer that failed."""
        setup = Observed(sample_rate=0.0)
        setup.step([DECODE, DECODE], new={1: {"glassbox": "trace"}})
        (rows,) = setup.measurer.rows
        assert [1, 0] == rows[:, ROW_SLOT].tolist()
        assert [EVERY] == setup.measurer.layers
        setup.conclude(3)
        setup.step([DECODE, DECODE])
        assert {0, 1, 2} == setup.measurer.layers[-1]
        assert [[1, 0]] == setup.measurer.rows[-1][:, [ROW_BATCH, ROW_SLOT]].tolist()

    def test_a_traced_request_on_probation(self) -> None:
        """It has no numbers as long as no layer is certified, and then has them."""
        setup = Observed(probation=True, sample_rate=0.0)
        setup.step([PREFILL], new={0: {"glassbox": "trace"}})
        assert [frozenset()] == setup.measurer.layers
        setup.conclude()
        setup.step([DECODE])
        assert EVERY == setup.measurer.layers[-1]

    def test_a_request_that_is_left_out(self) -> None:
        """It is not checked."""
        setup = Observed(sample_rate=0.0)
        setup.step([DECODE], new={0: {"glassbox": "off"}})
        assert [] == setup.measurer.rows
        setup.step([DECODE, DECODE])
        assert [1] == setup.measurer.rows[0][:, ROW_BATCH].tolist()

    @pytest.mark.parametrize("call", ["begin", "finish"])
    def test_a_step_that_fails(self, call: str) -> None:
        """Nothing is known of the layers; they are tried again by the interval."""
        setup = Observed()
        setup.measurer.failing = {call}
        setup.step([PREFILL])
        setup.step([DECODE])
        setup.measurer.failing = set()
        assert [LayerState.PENDING] * len(LAYERS) == setup.canary.checks().state.tolist()
        setup.canary_clock.now += 30
        setup.step([DECODE])
        setup.conclude()
        assert [LayerState.CERTIFIED] * len(LAYERS) == setup.canary.checks().state.tolist()

    def test_a_canary_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The step is measured all the same, as any other."""
        setup = Observed()
        monkeypatch.setattr(setup.canary, "_candidates", lambda *_: 1 / 0)
        setup.step([DECODE])
        assert {"canary": 1} == setup.errors.counts()
        assert ([EVERY], None) == (setup.measurer.layers, setup.measurer.check)

    def test_budget(self) -> None:
        """What checks cost is not the sample's; steps that are only looked at are charged as any other."""
        setup = Observed(sampling={"overhead_budget": 0.01})
        setup.measurer.seconds = {"finish": 0.0002}
        for step in range(400):
            setup.measurer.seconds = {"finish": 5.0 if step in (0, 1) else 0.0002}
            setup.step([DECODE if step else PREFILL], step_s=0.05)
        assert 1 == setup.observer.effective_sample_rate
        setup = Observed(sampling={"overhead_budget": 0.01})
        setup.measurer.seconds = {"finish": 0.01}
        for _ in range(200):
            setup.canary_clock.now += 2
            setup.step([DECODE], step_s=0.05)
        assert setup.observer.effective_sample_rate < 1, "the prefill that is missing never comes"
