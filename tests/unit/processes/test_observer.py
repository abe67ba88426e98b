"""The observer: which steps and rows it hands to the measurer, what it counts, and that it never fails serving."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
import torch

from glassbox.adapter.attention.cache_layout import CacheLayout, Places
from glassbox.adapter.scheduler import ScheduledStep
from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.rows import ROW_BATCH, ROW_PHASE, ROW_PROMPT_LEN, ROW_QUERY, ROW_SLOT, ROW_UNCOUNTED
from glassbox.core.start_parts import StartParts
from glassbox.measure.contract import CheckLimits, StepLayers
from glassbox.measure.deferred import DeferredActions
from glassbox.measure.row_lists import RowList, row_lists
from glassbox.processes.worker.adapters import AdapterSlots
from glassbox.processes.worker.canary import Canary
from glassbox.processes.worker.observer import Observer
from glassbox.processes.worker.traces.traced_step import TracedStep
from glassbox.processes.worker.traces.tracker import RequestTracker
from tests.canaries import QuietCanary, make_place
from tests.trace_samples import Continued, Scheduled, make_host, new_request, scheduled_step

LAYERS: Final = (0, 1, 2, 3)
NAMES: Final = tuple(f"model.layers.{layer}.self_attn.attn" for layer in LAYERS)
NUM_HEADS: Final = 5


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeMeasurer:
    """Writes down what it is asked to do; fails, and takes time, where it is told to."""

    def __init__(self, clock: Clock) -> None:
        self.max_rows = self.max_traced_rows = self.num_slots = 1000
        self.check_limits = CheckLimits(8, 1000)
        self.check: Any = None
        self.calls: list[str] = []
        self.rows: list[np.ndarray] = []
        # Of each step, and the layers that have one.
        self.lists: list[list[RowList]] = []
        self.layers: list[frozenset[int]] = []
        self.failing: set[str] = set()
        self.uncompiled: frozenset[int] = frozenset()
        self.seconds: dict[str, float] = {}
        self.traced: TracedStep | None = None
        self._clock = clock

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self._clock.now += self.seconds.get(name, 0.0)
        if name in self.failing:
            raise RuntimeError(f"{name} is broken")

    def end_warm_up(self) -> frozenset[int]:
        self._called("end_warm_up")
        return self.uncompiled

    def begin(self, rows: np.ndarray, layers: StepLayers, traced: TracedStep | None, check: Any) -> None:
        self.check = check
        self.rows.append(rows)
        wanted = [] if traced is None else traced.wanted
        of_traces = [one._replace(local_layers=one.local_layers & layers.observed) for one in wanted]
        self.lists.append(row_lists(rows, layers.sampled, of_traces))
        self.layers.append(frozenset().union(*(one.local_layers for one in self.lists[-1])))
        self.traced = traced
        self._called("begin")

    def on_build(self, layer_names: list[str], common_attn_metadata: Any) -> None:
        self._called("on_build")

    def after_attention(self, *args: Any) -> None:
        self._called("after_attention")

    def discard(self) -> None:
        self.traced = None
        self._called("discard")

    def finish(self) -> None:
        self._called("finish")
        if self.traced is not None:
            self.traced.commit()
            self.traced = None

    def copy(self, now_s: float) -> Any:
        raise NotImplementedError


class VllmLayer(SimpleNamespace):
    """Can be held weakly, as vLLM's can."""


# One block of one token of one KV head, eight numbers of K and then eight of V.
LAYOUT: Final = CacheLayout(
    0,
    (1, 1, 16),
    (16, 16, 16, 1),
    torch.float32,
    1,
    1,
    Places(16, 0, torch.arange(8)[None]),
    Places(16, 0, torch.arange(8, 16)[None]),
)


def observed_call(name: str) -> tuple[Any, ...]:
    """Impl, layer, query, no key and value, cache, metadata and output."""
    impl = SimpleNamespace(
        glassbox_view=None,
        glassbox_finder=SimpleNamespace(find=lambda *_: LAYOUT),
        scale=1.0,
        sliding_window=-1,
        logits_soft_cap=0,
        alibi_slopes=None,
        kv_cache_dtype="auto",
    )
    metadata = SimpleNamespace(block_table=None)
    query = torch.zeros(1, NUM_HEADS, 8)
    return impl, VllmLayer(layer_name=name), query, None, None, torch.zeros(1, 1, 1, 16), metadata, query


class Setup:
    """An observer, and what a step of vLLM does to it."""

    def __init__(self, canary: Canary | None = None, **config: Any) -> None:
        self.clock = Clock()
        self.start = StartParts(self.clock)
        self.measurer = FakeMeasurer(self.clock)
        self.listening: list[bool] = []
        # Of `listen`: fails from now on, after it has done its work.
        self.deaf = False
        self.written_s = 0.0
        self.errors = ErrorCounter(logging.getLogger("test.observer"))
        self.config = GlassboxConfig.model_validate({"sample_rate": 1.0, **config})
        self.requests = RequestTracker(make_host(layers=LAYERS, num_heads=NUM_HEADS), DeferredActions(self.errors))
        self.observer = Observer(
            self.measurer,
            layers=LAYERS,
            layer_names=NAMES,
            layer_heads=(NUM_HEADS,) * len(LAYERS),
            config=lambda: self.config,
            requests=self.requests,
            canary=canary or QuietCanary(LAYERS),
            adapters=AdapterSlots(0),
            listen=self.listen,
            errors=self.errors,
            start=self.start,
            written_s=lambda: self.written_s,
            clock=self.clock,
        )
        self.observer.arm({})
        # Of each layer what its impl's `forward` is given, as far as it is looked at.
        self.layers = [observed_call(name) for name in NAMES]

    def listen(self, on: bool) -> None:
        self.listening.append(on)
        if self.deaf:
            raise RuntimeError("listen is broken")

    def edit(self, **config: Any) -> None:
        """A reload."""
        self.config = GlassboxConfig.model_validate({"sample_rate": 1.0, **config})

    def step(
        self,
        requests: list[tuple[int, int, int]],
        *,
        step_s: float = 0.0,
        groups: tuple[tuple[str, ...], ...] = (NAMES,),
        new: dict[int, dict[str, Any]] | None = None,
        in_forward: Callable[[], None] = lambda: None,
        **said: Any,
    ) -> None:
        """One step of `(scheduled, computed, prompt length)` requests, whose forward takes `step_s` seconds.

        `new`: extra_args of those that the runner hears of for the first time; `said`: what else vLLM's output says.
        """
        scheduled, computed, prompt = (np.array(column, dtype=np.int32) for column in zip(*requests, strict=True))
        starts = np.concatenate([[0], np.cumsum(scheduled)]).astype(np.int32)
        # vLLM's buffers are longer than the batch; what is behind it is old.
        batch = SimpleNamespace(
            num_reqs=len(requests),
            num_computed_tokens_cpu=np.append(computed, 77),
            num_prompt_tokens=np.append(prompt, 99),
            req_ids=[*(f"request-{i}" for i in range(len(requests))), "old"],
        )
        metadata = SimpleNamespace(
            query_start_loc_cpu=torch.from_numpy(np.append(starts, starts[-1])),
            query_start_loc=None,
            seq_lens=torch.from_numpy(np.append(computed + scheduled, 0)),
            block_table_tensor=None,
            causal=True,
            mm_req_doc_ranges=None,
        )
        output = Scheduled(
            scheduled_new_reqs=[
                new_request(f"request-{i}", requests[i][2], extra_args) for i, extra_args in (new or {}).items()
            ],
            num_scheduled_tokens={f"request-{i}": int(n) for i, n in enumerate(scheduled)},
            **said,
        )
        self.observer.start_step(SimpleNamespace(input_batch=batch), ScheduledStep(output))
        try:
            for names in groups:
                self.observer.on_build(list(names), metadata)
            for layer in self.layers if self.listening[-1:] == [True] else ():
                self.observer.after_attention(*layer)
            in_forward()
            self.clock.now += step_s
        finally:
            self.observer.stop_step()


PREFILL: Final = (6, 0, 6)
DECODE: Final = (1, 9, 7)
# Metadata of a run that is no step.
DUMMY: Any = SimpleNamespace(
    query_start_loc=None, seq_lens=None, block_table_tensor=None, causal=True, mm_req_doc_ranges=None
)


class TestArming:
    def test_armed_after_warm_up(self) -> None:
        """Arming tells the measurer that capture is over; until then no step counts."""
        setup = Setup()
        assert setup.measurer.calls == ["end_warm_up"]
        assert setup.observer.armed
        setup.observer.disarm()
        assert not setup.observer.armed

    def test_what_warm_up_costs_is_of_the_start(self) -> None:
        """Its layers, also those that fail, and its end; a step's are overhead."""
        setup = Setup()
        setup.measurer.seconds = {"after_attention": 0.5, "end_warm_up": 0.25}
        setup.measurer.failing = {"after_attention"}
        for layer in setup.layers:
            setup.observer.after_attention(*layer)
        setup.observer.arm({})
        assert {"observe": len(NAMES)} == setup.errors.counts()
        setup.measurer.failing = set()
        setup.step([DECODE])
        assert 0.5 * len(NAMES) + 0.25 == setup.start.seconds()["kernels"]
        assert 0.5 * len(NAMES) == setup.observer.counters.overhead_seconds

    def test_layers_are_listened_to_in_warm_up_and_in_measured_steps(self) -> None:
        """Graphs are captured in warm-up; a step that is not measured is vLLM's own."""
        setup = Setup(sample_rate=0.5)
        assert setup.listening == [True, False]
        heard = []
        for _ in range(4):
            setup.listening.clear()
            setup.step([DECODE])
            heard.append(list(setup.listening))
        assert heard == [[], [True, False]] * 2


class TestSampledStep:
    def test_order_of_calls(self) -> None:
        """Metadata, then the row list, then the layers, then the end."""
        setup = Setup()
        setup.step([PREFILL, DECODE])
        layers = ["after_attention"] * len(NAMES)
        assert ["end_warm_up", "on_build", "begin", *layers, "finish"] == setup.measurer.calls

    def test_rows(self) -> None:
        """Positions of the prompt and the generated token, at their places among the step's tokens."""
        setup = Setup(sampling={"prefill_rows_per_request": 2})
        setup.step([PREFILL, DECODE])
        (rows,) = setup.measurer.rows
        expected = [(2, 0, 0), (5, 0, 0), (6, 1, 1)]
        assert [tuple(row) for row in rows[:, [ROW_QUERY, ROW_BATCH, ROW_PHASE]]] == expected
        assert setup.measurer.layers == [frozenset(range(4))]

    def test_chosen_once(self) -> None:
        """Metadata is built for each group of layers; the rows are those of the step, not of the group."""
        setup = Setup()
        setup.step([DECODE], groups=(NAMES[:2], NAMES[2:]))
        assert setup.measurer.calls.count("begin") == 1
        assert setup.measurer.calls.count("on_build") == 2

    def test_drafters_metadata(self) -> None:
        """Layers that are not observed choose no rows."""
        setup = Setup()
        setup.step([DECODE], groups=(("draft_model.layers.0.attn",), NAMES))
        assert setup.measurer.calls.count("on_build") == setup.measurer.calls.count("begin") == 1

    def test_no_rows(self) -> None:
        """A chunk in which no position is chosen counts as measured, and asks nothing of the measurer."""
        setup = Setup(sampling={"prefill_rows_per_request": 1})
        setup.step([(3, 0, 100)])
        assert "begin" not in setup.measurer.calls
        assert setup.observer.counters.sampled_steps == 1

    def test_dropped_rows(self) -> None:
        """What exceeds max_rows_per_step is counted as rows are: once per measured layer and head."""
        setup = Setup(sampling={"max_rows_per_step": 2, "layers": [1, 3]})
        setup.step([DECODE] * 5)
        assert setup.observer.counters.dropped_rows == {"max_rows_per_step": 3 * 2 * NUM_HEADS}
        assert len(setup.measurer.rows[0]) == 2

    def test_measurers_limit(self) -> None:
        """A GPU's row list has a fixed size that no edit exceeds."""
        setup = Setup()
        setup.measurer.max_rows = 3
        setup.edit(sampling={"max_rows_per_step": 4000})
        setup.step([DECODE] * 5)
        assert len(setup.measurer.rows[0]) == 3


class TestRowsAreWhatTheyAreCalled:
    def test_drafts(self, caplog: pytest.LogCaptureFixture) -> None:
        """They are not measured, and counted as rows are; the log says so once."""
        setup = Setup(sampling={"layers": [1, 3]})
        with caplog.at_level("INFO", "glassbox"):
            setup.step([(4, 9, 7), DECODE], scheduled_spec_decode_tokens={"request-0": [1, 2, 3]})
        (rows,) = setup.measurer.rows
        assert rows[:, [ROW_QUERY, ROW_PHASE]].tolist() == [[0, 1], [4, 1]]
        assert setup.observer.counters.dropped_rows == {"draft": 3 * 2 * NUM_HEADS}
        assert "left out of the histograms: draft tokens of speculative decoding" in caplog.text
        caplog.clear()
        with caplog.at_level("INFO", "glassbox"):
            setup.step([(4, 12, 7), DECODE], scheduled_spec_decode_tokens={"request-0": [1, 2, 3]})
        assert setup.observer.counters.dropped_rows == {"draft": 6 * 2 * NUM_HEADS}
        assert caplog.text == ""

    def test_drafts_of_one_that_is_off(self) -> None:
        """A request without statistics leaves none out."""
        setup = Setup()
        drafts = {"request-0": [1, 2, 3]}
        setup.step([(4, 9, 7), DECODE], new={0: {"glassbox": "off"}}, scheduled_spec_decode_tokens=drafts)
        assert setup.observer.counters.dropped_rows == {}

    def test_resumed(self) -> None:
        """Of a request that was preempted at its third token, that one alone is measured when it is resumed."""
        setup = Setup()
        setup.step([(9, 0, 6)], scheduled_cached_reqs=Continued(["request-0"], [0], [3], {"request-0"}))
        assert setup.measurer.rows[0][:, [ROW_QUERY, ROW_PHASE]].tolist() == [[8, 1]]

    def test_beam(self) -> None:
        """A beam's newest token is one that was generated, after the client's prompt."""
        setup = Setup()
        setup.step([(9, 0, 9)], new={0: {"glassbox_beam_prompt": 6}})
        (rows,) = setup.measurer.rows
        assert rows[:, [ROW_QUERY, ROW_PHASE, ROW_PROMPT_LEN]].tolist() == [[8, 1, 6]]


class TestUncompiledLayers:
    def test_one_whose_kernel_failed_in_warm_up(self, caplog: pytest.LogCaptureFixture) -> None:
        """It is not observed, and says why; the others are."""
        canary = QuietCanary(LAYERS)
        setup = Setup(canary)
        setup.measurer.uncompiled = frozenset({1})
        with caplog.at_level("WARNING", "glassbox"):
            setup.observer.arm({})
        setup.step([DECODE])
        assert f"1 of {len(LAYERS)} layers are not observed: no kernel" in caplog.text
        assert {"kernel": 1} == canary.not_observed()
        assert frozenset(range(len(LAYERS))) - {1} == canary.allowed == setup.measurer.layers[-1]


class TestRepeatedLayers:
    def test_one_that_runs_again_in_a_step(self, caplog: pytest.LogCaptureFixture) -> None:
        """It is not observed any more, which is said once; its step isn't measured, and the other layers go on."""
        canary = QuietCanary(LAYERS)
        setup = Setup(canary)
        with caplog.at_level("WARNING", "glassbox"):
            for _ in range(3):
                setup.step([DECODE], in_forward=lambda: setup.observer.after_attention(*setup.layers[1]))
        assert "runs several times in a step" in caplog.text
        assert {"repeated": 1} == setup.errors.counts() == canary.not_observed()
        assert ["discard"] == [call for call in setup.measurer.calls if call == "discard"]
        assert frozenset(range(len(LAYERS))) - {1} == canary.allowed == setup.measurer.layers[-1]


class TestSteps:
    def test_unsampled_step(self) -> None:
        """It is counted; no rows are chosen and the measurer isn't asked to finish."""
        setup = Setup(sample_rate=0.0)
        setup.step([PREFILL])
        assert (setup.observer.counters.steps, setup.observer.counters.sampled_steps) == (1, 0)
        assert "begin" not in setup.measurer.calls
        assert "finish" not in setup.measurer.calls

    def test_share(self) -> None:
        """Of 1,000 steps at a rate of 0.05 there are 50 measured."""
        setup = Setup(sample_rate=0.05)
        for _ in range(1000):
            setup.step([DECODE])
        assert (setup.observer.counters.steps, setup.observer.counters.sampled_steps) == (1000, 50)
        assert setup.measurer.calls.count("finish") == 50

    def test_build_outside_of_a_step(self) -> None:
        """A dummy run builds metadata, too: the measurer may keep it, but nothing is measured."""
        setup = Setup()
        setup.observer.on_build(list(NAMES), DUMMY)
        setup.observer.after_attention(*setup.layers[0])
        assert "begin" not in setup.measurer.calls
        assert setup.observer.counters.steps == 0
        assert setup.errors.counts() == {}


class TestEdits:
    def test_at_the_next_step(self) -> None:
        """Rate, layers and rows of a new configuration hold from the next step on."""
        setup = Setup(sample_rate=0.0)
        setup.step([PREFILL])
        setup.edit(sampling={"layers": {"every": 2}, "prefill_rows_per_request": 1})
        setup.step([PREFILL])
        assert setup.observer.counters.sampled_steps == 1
        assert setup.measurer.layers == [frozenset({0, 2})]
        assert [row[ROW_QUERY] for row in setup.measurer.rows[0]] == [5]

    def test_rate_shows_at_once(self) -> None:
        """The exported rate is that of the configuration in force, also while no step comes."""
        setup = Setup(sample_rate=0.25)
        assert setup.observer.effective_sample_rate == 0.25
        setup.edit(sample_rate=0.5)
        assert setup.observer.effective_sample_rate == 0.5

    def test_enabled_false(self) -> None:
        """It stops measuring, and the rate shows it."""
        setup = Setup()
        setup.edit(enabled=False)
        setup.step([DECODE])
        assert setup.observer.effective_sample_rate == 0
        assert setup.observer.counters.sampled_steps == 0

    def test_same_configuration(self) -> None:
        """Rows that take turns go on taking turns as long as the configuration is the same object."""
        setup = Setup(sampling={"max_rows_per_step": 1})
        for _ in range(3):
            setup.step([DECODE] * 3)
        assert [int(rows[0, ROW_BATCH]) for rows in setup.measurer.rows] == [0, 1, 2]


class TestLayersPerStep:
    """Layers that take turns."""

    @staticmethod
    def times(setup: Setup) -> list[int]:
        """How often each layer was measured."""
        return [sum(layer in layers for layers in setup.measurer.layers) for layer in LAYERS]

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_each_layer_keeps_the_rate(self, count: int) -> None:
        """Of 3,000 steps at a rate of 0.05 each is measured in 150, or one more or less, at an even cost."""
        setup = Setup(sample_rate=0.05, sampling={"layers_per_step": count})
        for _ in range(3000):
            setup.step([DECODE])
        assert {count} == {len(layers) for layers in setup.measurer.layers}
        assert all(abs(times - 150) <= 1 for times in self.times(setup))
        assert setup.observer.counters.sampled_steps == len(setup.measurer.layers)
        assert pytest.approx(0.05) == setup.observer.effective_sample_rate

    def test_a_rate_that_cannot_be_kept(self) -> None:
        """Every step is measured, and the rate that is shown is what that gives a layer."""
        setup = Setup(sample_rate=0.5, sampling={"layers_per_step": 1})
        for _ in range(100):
            setup.step([DECODE])
        assert [25] * 4 == self.times(setup)
        assert 0.25 == setup.observer.effective_sample_rate

    def test_edits(self) -> None:
        """At the next step, and what was even stays so; the turns go on where they were."""
        setup = Setup(sampling={"layers_per_step": 1})
        for _ in range(5):
            setup.step([DECODE])
        setup.edit(sampling={"layers_per_step": 3, "prefill_rows_per_request": 1})
        assert 0.75 == setup.observer.effective_sample_rate
        for _ in range(5):
            setup.step([DECODE])
            assert max(self.times(setup)) - min(self.times(setup)) <= 1
        assert 3 == len(setup.measurer.layers[-1])
        setup.edit(sampling={"layers": [1, 3], "layers_per_step": 3})
        setup.step([DECODE])
        assert {1, 3} == setup.measurer.layers[-1], "more than there are: all"
        assert 1 == setup.observer.effective_sample_rate
        setup.edit()
        setup.step([DECODE])
        assert frozenset(range(4)) == setup.measurer.layers[-1]

    def test_traced_rows_are_never_thinned(self) -> None:
        """They are measured in all their layers in every step, the others' rows only where it is the layer's turn."""
        setup = Setup(sampling={"layers_per_step": 1}, sample_rate=0.125)
        setup.step([DECODE, DECODE], new={1: {"glassbox": "trace", "glassbox_layers": [0, 1, 2]}})
        for _ in range(799):
            setup.step([DECODE, DECODE])
        counted = np.zeros(4, dtype=int)
        for lists in setup.measurer.lists:
            traced = {local for one in lists if (one.rows[:, ROW_SLOT] >= 0).any() for local in one.local_layers}
            assert {0, 1, 2} == traced
            for one in lists:
                counted[list(one.local_layers)] += len(one.counted)
                assert len(one.local_layers) * len(one.counted) in {0, 2}
        assert [2 * 100] * 4 == counted.tolist()

    def test_a_check(self) -> None:
        """It is of all layers, whoever's turn it is, and the sample of its step is measured as any other."""
        clock = Clock()
        canary = Canary(make_place(LAYERS), CheckLimits(8, 1000), probation=False, clock=clock)
        setup = Setup(canary, sampling={"layers_per_step": 1})
        setup.step([DECODE])
        assert frozenset(range(4)) == setup.measurer.check.local_layers
        assert 1 == len(setup.measurer.layers[0])
        assert {} == setup.observer.counters.dropped_rows

    def test_steps_without_rows_take_no_turn(self) -> None:
        """A chunk of a prompt in which no position is chosen."""
        setup = Setup(sampling={"layers_per_step": 1, "prefill_rows_per_request": 1})
        for _ in range(4):
            setup.step([(3, 0, 100)])
            setup.step([DECODE])
        assert [1] * 4 == self.times(setup)

    def test_dropped_rows(self) -> None:
        """In the layers of the step alone."""
        setup = Setup(sampling={"max_rows_per_step": 2, "layers_per_step": 3})
        setup.step([DECODE] * 5)
        assert setup.observer.counters.dropped_rows == {"max_rows_per_step": 3 * 3 * NUM_HEADS}

    def test_budget(self) -> None:
        """Kept at what steps of few layers cost; the shown rate is that of a layer."""
        setup = Setup(sample_rate=0.25, sampling={"overhead_budget": 0.01, "layers_per_step": 1})
        setup.measurer.seconds = {"finish": 0.01}
        start = setup.clock.now
        for _ in range(4000):
            setup.step([DECODE], step_s=0.05)
        share = setup.observer.counters.overhead_seconds / (setup.clock.now - start)
        assert 0.002 < share <= 0.0105
        measured = len(setup.measurer.layers) / 4000
        assert setup.observer.effective_sample_rate == pytest.approx(measured / 4, rel=0.5)
        assert max(self.times(setup)) - min(self.times(setup)) <= 1


class TestTracedRequests:
    def test_every_step(self) -> None:
        """A traced request's rows are measured in steps that are not sampled, too, and are marked there."""
        setup = Setup(sample_rate=0.0)
        setup.step([DECODE, DECODE], new={1: {"glassbox": "trace"}})
        setup.step([DECODE, DECODE])
        assert setup.observer.counters.sampled_steps == 0
        for rows in setup.measurer.rows:
            assert rows[:, [ROW_BATCH, ROW_PHASE, ROW_SLOT]].tolist() == [[1, 1 | ROW_UNCOUNTED, 0]]
        assert setup.measurer.calls.count("finish") == 2

    def test_sampled_step(self) -> None:
        """There its rows belong to the sample, as any other's."""
        setup = Setup()
        setup.step([DECODE, DECODE], new={1: {"glassbox": "trace"}})
        (rows,) = setup.measurer.rows
        assert rows[:, [ROW_BATCH, ROW_PHASE, ROW_SLOT]].tolist() == [[0, 1, -1], [1, 1, 0]]

    @pytest.mark.parametrize(("rate", "layers"), [(0.0, {1}), (1.0, {0, 1, 2, 3})])
    def test_layers(self, rate: float, layers: set[int]) -> None:
        """Beyond the sample only layers are measured that a trace keeps."""
        setup = Setup(sample_rate=rate)
        setup.step([DECODE], new={0: {"glassbox": "trace", "glassbox_layers": [LAYERS[1]]}})
        assert [frozenset(layers)] == setup.measurer.layers

    def test_nothing_but_what_each_trace_keeps(self) -> None:
        """Traces of different layers in one step: each row is measured in its own ones, beside the sample's in all."""
        setup = Setup(sample_rate=0.0)
        asks = {n: {"glassbox": "trace", "glassbox_layers": layers} for n, layers in ((1, [0, 1]), (2, [1, 3]))}
        setup.step([DECODE] * 4, new=asks)
        assert [({0}, [1]), ({1}, [1, 2]), ({3}, [2])] == self.listed(setup)
        assert not any(len(one.counted) for one in setup.measurer.lists[-1])
        setup.edit(sampling={"layers": [2, 3]})
        setup.step([DECODE] * 4)
        assert [({0}, [1]), ({1}, [1, 2]), ({2}, [0, 1, 2, 3]), ({3}, [0, 1, 2, 3])] == self.listed(setup)
        assert [0, 0, 4, 4] == [len(one.counted) for one in setup.measurer.lists[-1]]
        assert [[-1] * 4, [-1, -1, 1, -1]] == [one.rows[:, ROW_SLOT].tolist() for one in setup.measurer.lists[-1][2:]]

    @staticmethod
    def listed(setup: Setup) -> list[tuple[frozenset[int], list[int]]]:
        """Layers and batch rows of the last step's lists."""
        lists = sorted(setup.measurer.lists[-1], key=lambda one: sorted(one.local_layers))
        return [(one.local_layers, one.rows[:, ROW_BATCH].tolist()) for one in lists]

    def test_no_memory_for_any(self) -> None:
        """Nothing is measured of rows that nobody would keep."""
        setup = Setup(sample_rate=0.0, requests={"max_active_mb": 1})
        setup.step([DECODE], new={0: {"glassbox": "trace"}})
        (trace,) = setup.requests.active()
        trace.nbytes = 10**9
        setup.step([(1, 10, 7)])
        assert 1 == len(setup.measurer.rows)

    def test_off(self) -> None:
        """A request that wants to be left out is in no row list."""
        setup = Setup()
        setup.step([DECODE, DECODE], new={0: {"glassbox": "off"}})
        assert setup.measurer.rows[0][:, ROW_BATCH].tolist() == [1]

    def test_rows_reach_the_trace(self) -> None:
        """What the measurer adds in the step is in the request's record after it."""
        setup = Setup(sample_rate=0.0)
        stats = np.arange(NUM_HEADS * 10, dtype=np.float32).reshape(1, NUM_HEADS, 10)

        def measure() -> None:
            assert setup.measurer.traced is not None
            setup.measurer.traced.add_stats([2], np.arange(1), stats[None])

        setup.step([DECODE], new={0: {"glassbox": "trace"}}, in_forward=measure)
        (trace,) = setup.requests.active()
        record = trace.record()
        assert (record.positions.tolist(), record.phases.tolist(), record.prompt_len) == ([9], [1], 7)
        np.testing.assert_array_equal(stats, record.stats[:, 2])
        assert np.isnan(record.stats[:, [0, 1, 3]]).all(), "nobody measured those"

    def test_a_step_that_fails(self) -> None:
        """Rows that could not be measured hold no numbers; the next step's do."""
        setup = Setup(sample_rate=0.0)
        setup.measurer.failing = {"finish"}
        setup.step([DECODE], new={0: {"glassbox": "trace"}})
        setup.measurer.failing = set()
        setup.step([(1, 10, 7)])
        (trace,) = setup.requests.active()
        assert trace.record().positions.tolist() == [10]

    def test_budget(self) -> None:
        """Traces of one request after another keep to the budget too, and those that lost rows say so."""
        setup = Setup(sample_rate=0.01, sampling={"overhead_budget": 0.01})
        setup.measurer.seconds = {"begin": 0.02}
        setup.step([DECODE], step_s=0.05, new={0: {"glassbox": "trace"}})
        for _ in range(100):  # what the first minute may cost at once is spent
            setup.step([DECODE], step_s=0.05)
        start, before = setup.clock.now, setup.observer.counters.overhead_seconds
        for _ in range(20_000):
            setup.step([DECODE], step_s=0.05)
        share = (setup.observer.counters.overhead_seconds - before) / (setup.clock.now - start)
        assert 0.004 < share <= 0.0105
        (trace,) = setup.requests.active()
        assert trace.record().truncated
        assert 19_000 < setup.observer.counters.trace_skipped_steps < 20_100

    def test_budget_is_shared(self) -> None:
        """Neither the sample nor the traces starve the other: each has rows in the long run."""
        setup = Setup(sample_rate=0.2, sampling={"overhead_budget": 0.02})
        setup.measurer.seconds = {"begin": 0.02}
        setup.step([DECODE, DECODE], step_s=0.05, new={0: {"glassbox": "trace"}})
        for _ in range(10_000):
            setup.step([DECODE, DECODE], step_s=0.05)
        setup.measurer.rows.clear()
        start, before = setup.clock.now, setup.observer.counters.overhead_seconds
        for _ in range(20_000):
            setup.step([DECODE, DECODE], step_s=0.05)
        share = (setup.observer.counters.overhead_seconds - before) / (setup.clock.now - start)
        assert share <= 0.021
        counted = sum(1 for rows in setup.measurer.rows if (rows[:, ROW_PHASE] & ROW_UNCOUNTED == 0).any())
        traced = sum(1 for rows in setup.measurer.rows if (rows[:, ROW_SLOT] >= 0).any())
        # Half of the budget is one step in a hundred at 20 ms on 50.
        assert min(counted, traced) > 20_000 / 400, (counted, traced)

    def test_a_trace_that_comes_when_the_budget_is_spent(self) -> None:
        """It is refused, by a reason of its own; after a pause the next one is traced again."""
        setup = Setup(sample_rate=0.0, sampling={"overhead_budget": 0.01})
        setup.measurer.seconds = {"begin": 0.05}
        setup.step([DECODE], step_s=0.05, new={0: {"glassbox": "trace"}})
        for _ in range(200):
            setup.step([DECODE], step_s=0.05)
        setup.step([DECODE, DECODE], step_s=0.05, new={1: {"glassbox": "trace"}})
        assert setup.requests.counts()[0]["budget"] == 1
        gone = {"finished_req_ids": {"request-0", "request-1"}}
        setup.observer.idle_step(SimpleNamespace(), scheduled_step(**gone))
        for _ in range(2000):
            setup.step([DECODE], step_s=0.05)
        setup.step([DECODE], step_s=0.05, new={0: {"glassbox": "trace"}})
        assert setup.requests.counts()[0]["budget"] == 1
        assert not setup.requests.active()[0].record().truncated

    def test_traces_whose_end_is_dear(self) -> None:
        """Writing ended ones is paid from the same budget, so further ones are refused until it is paid back."""
        setup = Setup(sample_rate=0.0, sampling={"overhead_budget": 0.01})
        for number, budget in enumerate((0, 0, 1)):
            setup.step([DECODE], step_s=0.05, new={0: {"glassbox": "trace"}})
            assert budget == setup.requests.counts()[0]["budget"], number
            setup.observer.idle_step(SimpleNamespace(), scheduled_step(finished_req_ids={"request-0"}))
            setup.written_s += 0.5
            setup.step([DECODE], step_s=0.05)
        for _ in range(3000):
            setup.step([DECODE], step_s=0.05)
        setup.step([DECODE], step_s=0.05, new={0: {"glassbox": "trace"}})
        assert 1 == setup.requests.counts()[0]["budget"]

    def test_without_a_budget(self) -> None:
        """Traces are measured in every step, whatever they cost."""
        setup = Setup(sample_rate=0.0)
        setup.measurer.seconds = {"begin": 1.0}
        for step in range(100):
            setup.step([DECODE], step_s=0.05, new={} if step else {0: {"glassbox": "trace"}})
        assert (len(setup.measurer.rows), setup.observer.counters.trace_skipped_steps) == (100, 0)

    def test_gone_with_a_step_without_tokens(self) -> None:
        """The last request's end comes with an output that schedules nothing."""
        setup = Setup()
        setup.step([DECODE], new={0: {"glassbox": "trace"}})
        setup.observer.idle_step(SimpleNamespace(), scheduled_step(finished_req_ids={"request-0"}))
        assert (setup.requests.active(), len(setup.requests.ended())) == ([], 1)
        assert setup.observer.counters.steps == 1

    def test_a_scheduler_output_of_another_shape(self) -> None:
        """An error in following requests is counted; the step is sampled all the same."""
        setup = Setup()
        setup.observer.idle_step(SimpleNamespace(), ScheduledStep(SimpleNamespace()))
        assert setup.errors.counts() == {"progress": 1, "requests": 1}
        setup.step([DECODE], new={0: {"glassbox": object()}})
        assert len(setup.measurer.rows) == 1


class TestOverhead:
    def test_all_parts_and_nothing_else(self) -> None:
        """Seconds spent choosing rows, measuring layers and finishing; not those of the model."""
        setup = Setup()
        setup.measurer.seconds = {"begin": 0.25, "after_attention": 0.5, "finish": 1.0}
        setup.step([DECODE], step_s=8.0)
        assert setup.observer.counters.overhead_seconds == 0.25 + 4 * 0.5 + 1.0

    def test_unsampled(self) -> None:
        """A step that isn't measured costs what keeping the metadata costs."""
        setup = Setup(sample_rate=0.0)
        setup.measurer.seconds = {"on_build": 0.125, "begin": 9.0, "finish": 9.0}
        setup.step([DECODE], step_s=8.0)
        assert setup.observer.counters.overhead_seconds == 0.125

    def test_budget(self) -> None:
        """With a budget that every step would exceed fewfold the share of time stays within it, in the long run."""
        setup = Setup(sampling={"overhead_budget": 0.01})
        setup.measurer.seconds = {"finish": 0.01}
        start = setup.clock.now
        for _ in range(4000):
            setup.step([DECODE], step_s=0.05)
        share = setup.observer.counters.overhead_seconds / (setup.clock.now - start)
        assert 0.002 < share <= 0.0105
        assert setup.observer.effective_sample_rate < 1

    def test_budget_lifted(self) -> None:
        """Without the budget the rate is what the file says, at once."""
        setup = Setup(sampling={"overhead_budget": 0.01})
        setup.measurer.seconds = {"finish": 0.01}
        for _ in range(50):
            setup.step([DECODE], step_s=0.05)
        assert setup.observer.effective_sample_rate < 1
        setup.edit()
        setup.step([DECODE])
        assert setup.observer.effective_sample_rate == 1


class TestFailures:
    @pytest.mark.parametrize(
        ("call", "stage"),
        [
            ("on_build", "choose_rows"),
            ("begin", "choose_rows"),
            ("after_attention", "observe"),
            ("finish", "end_step"),
        ],
    )
    def test_counted_and_swallowed(self, call: str, stage: str) -> None:
        """Whatever the measurer raises, the step goes on, nobody listens after it, and the next one is measured."""
        setup = Setup()
        setup.measurer.failing = {call}
        setup.measurer.seconds = {call: 0.25}
        setup.step([PREFILL, DECODE])
        assert set(setup.errors.counts()) == {stage}
        assert setup.listening[-2:] == [True, False]
        times = setup.measurer.calls.count(call)
        assert times * 0.25 == setup.observer.counters.overhead_seconds, "what fails costs, too"
        setup.measurer.failing = set()
        setup.measurer.calls.clear()
        setup.step([DECODE])
        assert setup.measurer.calls.count("begin") == setup.measurer.calls.count("finish") == 1
        assert setup.observer.counters.steps == 2

    @pytest.mark.parametrize("call", ["begin", "finish"])
    @pytest.mark.parametrize("also", [set(), {"discard"}])
    def test_what_has_begun_is_discarded(self, call: str, also: set[str]) -> None:
        """A measurer that fails half way may hold rows of this step: it is told to drop them, once."""
        setup = Setup()
        setup.measurer.failing = {call, *also}
        setup.step([DECODE])
        assert setup.measurer.calls.count("discard") == 1
        assert setup.listening[-1] is False
        assert setup.errors.counts().get("discard", 0) == len(also)

    def test_metadata_of_a_later_group_fails(self) -> None:
        """Rows were chosen already: what was begun is dropped, and the layers that follow are vLLM's own."""
        setup = Setup()
        on_build, built = setup.measurer.on_build, []

        def second_fails(layer_names: list[str], common_attn_metadata: Any) -> None:
            built.append(layer_names)
            if len(built) == 2:
                raise RuntimeError("the second is broken")
            on_build(layer_names, common_attn_metadata)

        setup.measurer.on_build = second_fails  # type: ignore[method-assign]
        setup.step([DECODE], groups=(NAMES[:2], NAMES[2:]))
        assert ["end_warm_up", "on_build", "begin", "discard"] == setup.measurer.calls
        assert setup.listening[-2:] == [True, False]
        setup.step([DECODE])
        assert setup.measurer.calls[-1] == "finish"

    def test_listening_fails(self) -> None:
        """It may have begun all the same, so it is ended; vLLM's step is not touched."""
        setup = Setup()
        setup.deaf = True
        setup.step([DECODE])
        assert setup.listening[-2:] == [True, False]
        assert setup.measurer.rows == []
        assert setup.errors.counts() == {"begin_step": 1, "listen": 1}
        setup.deaf = False
        setup.step([DECODE])
        assert len(setup.measurer.rows) == 1

    def test_tracker_fails(self) -> None:
        """Requests can't be followed: the sample is taken all the same, and a step without sample is vLLM's own."""
        setup = Setup(sample_rate=0.5)

        def fail(*_: Any) -> bool:
            raise KeyError("request")

        setup.requests.begin_step = fail  # type: ignore[method-assign]
        for _ in range(2):
            setup.step([DECODE])
        assert setup.errors.counts() == {"requests": 2}
        assert (len(setup.measurer.rows), setup.listening[-1]) == (1, False)

    def test_budget_counts_failed_steps(self) -> None:
        """Measuring that always fails, late and at a cost, is held to the budget like any other."""
        setup = Setup(sampling={"overhead_budget": 0.01})
        setup.measurer.failing, setup.measurer.seconds = {"finish"}, {"finish": 0.01}
        for _ in range(200):
            setup.step([DECODE], step_s=0.05)
        assert setup.observer.effective_sample_rate < 0.2

    def test_unreadable_configuration(self) -> None:
        """A step whose configuration can't be read is served unmeasured."""
        setup = Setup()
        good = setup.config

        def fail() -> GlassboxConfig:
            raise ValueError("no")

        setup.observer._read_config = fail
        setup.step([DECODE])
        assert setup.errors.counts() == {"begin_step": 1}
        assert setup.measurer.rows == []
        setup.observer._read_config = lambda: good
        setup.step([DECODE])
        assert len(setup.measurer.rows) == 1

    def test_step_that_raises(self) -> None:
        """An exception of vLLM's own passes through, and leaves no half step behind."""
        setup = Setup()

        def fail() -> None:
            raise MemoryError

        with pytest.raises(MemoryError):
            setup.step([DECODE], in_forward=fail)
        assert setup.measurer.calls[-1] == "finish"
        setup.observer.on_build(list(NAMES), DUMMY)
        assert setup.measurer.calls.count("begin") == 1
