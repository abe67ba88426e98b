"""Which requests are traced, whose each row is, and that nothing leaks: by hand and against a model of vLLM."""

import logging
import re
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from glassbox.adapter.row_mask import RowMask
from glassbox.adapter.runner import read_batch
from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.rows import ROW_BATCH, ROW_PHASE, ROW_QUERY, ROW_SLOT
from glassbox.core.signal_table import MAX_KEPT_TOKENS
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.core.trace_options import TraceOptions
from glassbox.measure.deferred import DeferredActions
from glassbox.measure.sampling import RowSampler, is_sampled_request
from glassbox.processes.worker.traces.active import TOO_LONG_FOR_KEYS
from glassbox.processes.worker.traces.traced_step import NOT_MEASURED
from glassbox.processes.worker.traces.tracker import REFUSAL_REASONS, RequestTracker, row_positions
from glassbox.store.file_names import request_digest
from glassbox.store.trace_refusals import Refusal
from tests.trace_samples import Continued, make_host, new_request, scheduled_step

LOCAL_LAYERS = frozenset({0, 1})
NO_RUNNER = SimpleNamespace()


def config(**requests: Any) -> GlassboxConfig:
    return GlassboxConfig.model_validate({"requests": requests})


def tracker(**host: Any) -> RequestTracker:
    return RequestTracker(make_host(**host), DeferredActions(ErrorCounter(logging.getLogger("test.requests"))))


def arrive(
    requests: RequestTracker, *ids: str, extra_args: dict[str, Any] | None = None, settings_: Any = None
) -> bool:
    """A step in which requests of 5 prompt tokens come; returns whether traced rows are in it."""
    output = scheduled_step([new_request(i, 5, extra_args) for i in ids], dict.fromkeys(ids, 5))
    return requests.begin_step(NO_RUNNER, output, settings_ or config(), LOCAL_LAYERS)


def finish(requests: RequestTracker, *ids: str, runner: Any = NO_RUNNER) -> None:
    requests.begin_step(runner, scheduled_step(finished_req_ids=set(ids)), config(), LOCAL_LAYERS)


def refused(requests: RequestTracker) -> dict[str, int]:
    return {reason: count for reason, count in requests.counts()[0].items() if count}


TRACE = {"glassbox": "trace"}


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    """Refusals are logged once per process: each test starts with none logged."""
    logging.getLogger("glassbox.processes.worker.traces.tracker").__dict__.pop("_glassbox_logged_once", None)


class TestTraceRate:
    def test_share_and_determinism(self) -> None:
        """Of 20,000 ids about the share is chosen, the same ones each time, and more of them at a higher rate."""
        ids = [f"cmpl-{i:032x}-0" for i in range(20_000)]
        chosen = {rate: {i for i in ids if is_sampled_request(i, rate)} for rate in (0.0, 0.01, 0.1, 1.0)}
        assert (len(chosen[0.0]), len(chosen[1.0])) == (0, 20_000)
        assert 150 < len(chosen[0.01]) < 250
        assert 1850 < len(chosen[0.1]) < 2150
        assert chosen[0.01] < chosen[0.1] == {i for i in ids if is_sampled_request(i, 0.1)}

    def test_samples_of_a_request_and_ranks_agree(self) -> None:
        """The eight characters and the sample's number don't matter: what the client knows does."""
        for rank in (0, 1):
            requests = tracker(rank=rank, num_heads_total=4, head_offset=2 * rank)
            ids = [f"{n}_cmpl-{i}-0-{n:08x}" for i in range(40) for n in range(3)]
            arrive(requests, *ids, settings_=config(trace_rate=0.5, max_active=1000))
            traced = [trace.request_id for trace in requests.active()]
            assert 0 < len(traced) < 120
            assert {traced.count(name) for name in traced} == {3}
            assert set(traced) == {f"cmpl-{i}-0" for i in range(40) if is_sampled_request(f"cmpl-{i}-0", 0.5)}
            assert requests.counts()[1] == {"opt_in": 0, "sampled": len(traced)}

    def test_the_api_server_chooses(self) -> None:
        """Where it has, the id says nothing; an edit to 0 holds at once."""
        for rate, traced in ((1.0, ["yes"]), (1e-9, ["yes"]), (0.0, [])):
            requests = tracker()
            for name, sampled in (("yes", True), ("no", False)):
                added = {"glassbox_sampled": sampled}
                arrive(requests, name, extra_args=added, settings_=config(trace_rate=rate))
            assert [trace.internal_id for trace in requests.active()] == traced

    def test_options_of_others_are_not_read(self) -> None:
        """A request that is sampled keeps no more than statistics."""
        requests = tracker()
        arrive(requests, "a", extra_args={"other": 1}, settings_=config(trace_rate=1.0))
        assert not requests.active()[0].options.probes

    def test_it_keeps_what_probes_read(self) -> None:
        """Of their layers those that this worker has; where it has none, that is no refusal. A client's own choice is
        not narrowed."""
        wanted = TraceOptions(layers=(1, 7), heads=(1,), signals=("selfattn",), prompt="all")
        for layers, kept in (((0, 1), (1,)), ((8, 9), None)):
            host = make_host(layers=layers)
            deferred = DeferredActions(ErrorCounter(logging.getLogger("test.requests")))
            requests = RequestTracker(host, deferred, sampled=lambda: wanted)
            arrive(requests, "a", settings_=config(trace_rate=1.0))
            assert {} == refused(requests)
            assert kept is None or wanted == requests.active()[0].options
            assert (kept or ()) == tuple(host.layers[n] for trace in requests.active() for n in trace.local_layers)
            arrive(requests, "b", extra_args=TRACE, settings_=config(trace_rate=1.0))
            assert (0, 1) == requests.active()[-1].local_layers

    def test_probes_of_other_layers_than_are_measured(self) -> None:
        """Without any choice of layers a worker that measures none refuses, as ever."""
        requests = tracker()
        step = scheduled_step([new_request("a", 5)], {"a": 5})
        requests.begin_step(NO_RUNNER, step, config(trace_rate=1.0), frozenset())
        assert {"bad_options": 1} == refused(requests)


class TestOptIn:
    def test_options_choose_layers_and_heads(self) -> None:
        """Global indices become those of the worker; what another rank has is not this one's business."""
        requests = tracker(layers=(4, 5, 6), num_heads=2, head_offset=2, num_heads_total=4)
        requests.begin_step(
            NO_RUNNER,
            scheduled_step(
                [new_request("a", 5, {**TRACE, "glassbox_layers": [6, 9], "glassbox_heads": [0, 3]})], {"a": 5}
            ),
            config(),
            frozenset({0, 1, 2}),
        )
        (trace,) = requests.active()
        assert (trace.local_layers, trace.head_columns) == ((2,), (1,))
        record = trace.record()
        assert (record.layers, record.heads, record.why, record.status) == ((6,), (3,), "opt_in", "active")

    def test_a_rank_without_the_head(self) -> None:
        """It keeps the request, with no heads."""
        requests = tracker(num_heads_total=4)
        arrive(requests, "a", extra_args={**TRACE, "glassbox_heads": [3]})
        assert requests.active()[0].record().heads == ()

    def test_traceparent(self) -> None:
        """It is kept for whoever makes a span."""
        requests = tracker()
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        arrive(requests, "a", extra_args={"glassbox_traceparent": parent}, settings_=config(trace_rate=1.0))
        assert requests.active()[0].record().traceparent == parent

    @pytest.mark.parametrize(
        ("noted", "adapter", "names"),
        [
            ({}, None, ("tiny/model", None)),
            ({"glassbox_model": "small"}, None, ("small", None)),
            ({}, "poet", ("poet", "poet")),
            ({"glassbox_model": "small"}, "poet", ("small", "poet")),
        ],
    )
    def test_names(self, noted: dict[str, Any], adapter: str | None, names: tuple[str, str | None]) -> None:
        """The model's as the client called it, and the adapter's; the engine keeps its own."""
        requests = tracker()
        new = new_request("a", 5, {**TRACE, **noted}, adapter=adapter)
        requests.begin_step(NO_RUNNER, scheduled_step([new], {"a": 5}), config(), LOCAL_LAYERS)
        (trace,) = requests.active()
        record = trace.record()
        assert (record.requested_model, record.adapter) == names
        assert record.model_name == "tiny/model"

    def test_nothing_is_kept_of_others(self) -> None:
        """A request that says nothing leaves nothing behind."""
        requests = tracker()
        assert not arrive(requests, "a", "b")
        assert not arrive(requests, "c", extra_args={"something": "else"})
        assert requests.marks(("a", "b", "c")) == (None, None)
        assert not requests._refused
        assert not requests._off


class TestRefusals:
    @pytest.mark.parametrize(
        ("reason", "extra_args", "requests", "host"),
        [
            ("bad_options", {**TRACE, "glassbox_top_k": -1}, {}, {}),
            ("bad_options", {"glassbox_what": 1}, {}, {}),
            ("bad_options", {**TRACE, "glassbox_layers": [7]}, {}, {}),
            ("bad_options", {**TRACE, "glassbox_heads": [2]}, {}, {}),
            ("bad_options", {**TRACE, "glassbox_spans": ["a=message:0"]}, {}, {}),
            ("opt_in_off", TRACE, {"opt_in": False}, {}),
            ("not_observed", TRACE, {}, {"unobserved": "its attention is something else"}),
        ],
    )
    def test_counted_and_logged_once(
        self, caplog: pytest.LogCaptureFixture, reason: str, extra_args: Any, requests: Any, host: Any
    ) -> None:
        """Each is counted by its reason; the first says why, and what becomes of the request."""
        logging.getLogger("glassbox").addHandler(caplog.handler)
        try:
            found = tracker(**host)
            for i in range(3):
                arrive(found, f"r{i}", extra_args=extra_args, settings_=config(**requests))
        finally:
            logging.getLogger("glassbox").removeHandler(caplog.handler)
        assert refused(found) == {reason: 3}
        assert found.active() == []
        (message,) = {r.getMessage() for r in caplog.records if "is served, but not traced" in r.getMessage()}
        assert "Request r0 is served, but not traced: " in message
        finish(found, "r0", "r1", "r2")
        assert not found._refused

    def test_max_active(self) -> None:
        """The next ones are refused, never queued: a place that becomes free is for those who come then."""
        requests = tracker()
        arrive(requests, "a", "b", "c", extra_args=TRACE, settings_=config(max_active=2))
        finish(requests, "a")
        arrive(requests, "d", extra_args=TRACE, settings_=config(max_active=2))
        assert [trace.internal_id for trace in requests.active()] == ["b", "d"]
        assert refused(requests) == {"max_active": 1}
        assert requests.counts()[1] == {"opt_in": 3, "sampled": 0}

    def test_each_client_has_its_places(self) -> None:
        """One that has all of its own keeps nobody else from being traced; who isn't known has no limit of its own."""
        requests, limited = tracker(), config(per_client={"max_active": 2})
        for client, ids in (("a" * 24, "abc"), ("anonymous", "def"), (None, "ghi")):
            named = TRACE if client is None else {**TRACE, "glassbox_client": client}
            arrive(requests, *ids, extra_args=named, settings_=limited)
        assert [trace.internal_id for trace in requests.active()] == list("abdeghi")
        assert [trace.client for trace in requests.active()][::2] == ["a" * 24, "anonymous", None, None]
        assert refused(requests) == {"client_max_active": 2}
        requests.begin_step(NO_RUNNER, scheduled_step(finished_req_ids={"a"}), limited, LOCAL_LAYERS)
        arrive(requests, "j", extra_args={**TRACE, "glassbox_client": "a" * 24}, settings_=limited)
        assert [trace.internal_id for trace in requests.active()][-1] == "j"

    def test_rows_of_a_client(self) -> None:
        """Beyond its rate its traces are truncated and further ones refused; another client's go on."""
        now_s, limited = 0.0, config(per_client={"rows_per_second": 1})
        requests = RequestTracker(
            make_host(), DeferredActions(ErrorCounter(logging.getLogger("test.requests"))), clock=lambda: now_s
        )
        greedy, other = ({**TRACE, "glassbox_client": name * 24} for name in "ab")
        arrive(requests, "a", extra_args=greedy, settings_=limited)
        arrive(requests, "b", extra_args=other, settings_=limited)
        rows = np.zeros((12, 5), dtype=np.int32)
        rows[:, ROW_QUERY], rows[:, ROW_SLOT] = np.arange(12), np.arange(12)
        rows[8:, ROW_BATCH] = 1
        step = SimpleNamespace(
            req_ids=("a", "b"),
            num_computed=np.array([0, 0]),
            query_start=np.array([0, 8]),
            prompt_len=np.array([8, 4]),
            num_scheduled=np.array([8, 4]),
        )
        for number, traced in ((1, {"a", "b"}), (2, {"b"})):
            assert requests.trace_rows(NO_RUNNER, step, rows, np.array([0, 0])) is not None
            assert {trace.internal_id for trace in requests.active() if not trace.truncated} == traced, number
        # Two rows are left of the ten: one more trace may begin, and with these it is over.
        for name, rows_left in (("c", 2), ("d", 0), ("e", 0)):
            arrive(requests, name, extra_args=greedy, settings_=limited)
            assert requests._quota.take("a" * 24, rows_left, 1)
        assert refused(requests) == {"client_rows": 2}
        now_s = 5.0
        arrive(requests, "f", extra_args=greedy, settings_=limited)
        assert [trace.internal_id for trace in requests.active()] == ["a", "b", "c", "f"]

    def test_switched_off(self) -> None:
        """With `enabled: false` nobody is traced, and who is traced has no more rows."""
        requests, off = tracker(), GlassboxConfig.model_validate({"enabled": False})
        arrive(requests, "a", extra_args=TRACE)
        assert not arrive(requests, "b", extra_args=TRACE, settings_=off)
        assert refused(requests) == {"disabled": 1}
        assert requests.marks(("a", "b"))[0] is None

    def test_unknown_positions(self) -> None:
        """Asynchronous scheduling with speculative decoding."""
        requests = tracker(knows_positions=False)
        arrive(requests, "a", extra_args=TRACE)
        assert refused(requests) == {"positions": 1}

    def test_every_reason_is_explained(self) -> None:
        """Series exist from the start, so that a rate sees the first refusal."""
        assert tracker().counts() == (dict.fromkeys(REFUSAL_REASONS, 0), {"opt_in": 0, "sampled": 0})


class TestBeams:
    def test_not_traced(self) -> None:
        """A beam's every token is a request of its own, which the rate may choose."""
        requests = tracker()
        arrive(requests, "a", extra_args={"glassbox_beam_prompt": 3}, settings_=config(trace_rate=1.0))
        assert requests.active() == []
        assert refused(requests) == {}


class TestOff:
    def test_until_it_is_gone(self) -> None:
        """It is marked as long as it runs, and with bad options, too."""
        requests = tracker()
        arrive(requests, "a", extra_args={"glassbox": "off"})
        arrive(requests, "b", extra_args={"glassbox": "off", "glassbox_rows": 1})
        excluded = requests.marks(("x", "b", "a"))[1]
        assert excluded is not None
        assert excluded.tolist() == [False, True, True]
        finish(requests, "a", "b")
        assert requests.marks(("x", "b", "a")) == (None, None)
        assert refused(requests) == {}


class TestEnds:
    def test_preempted_in_the_v2_runner(self) -> None:
        """It comes back as a new request: it stays what it was, and nobody is traced from the middle."""
        requests = tracker()
        arrive(requests, "a", extra_args=TRACE)
        arrive(requests, "b", extra_args=TRACE, settings_=config(max_active=1))
        again = [new_request(i, 5, TRACE, [0] * n) for i, n in (("a", 9), ("b", 5), ("c", 9))]
        requests.begin_step(NO_RUNNER, scheduled_step(again, dict.fromkeys("abc", 9)), config(), LOCAL_LAYERS)
        assert [trace.internal_id for trace in requests.active()] == ["a"]
        assert refused(requests) == {"max_active": 1}

    def test_one_whose_answer_waits(self) -> None:
        """Is told of when it has ended, and so written at once; of others nobody is told."""
        told: list[int] = []
        deferred = DeferredActions(ErrorCounter(logging.getLogger("test.requests")))
        requests = RequestTracker(make_host(), deferred, on_awaited=lambda: told.append(len(requests.ended())))
        arrive(requests, "a", "b", extra_args=TRACE)
        arrive(requests, "c", extra_args={**TRACE, "glassbox_respond": 1})
        finish(requests, "a", "b")
        assert told == []
        finish(requests, "c")
        assert told == [3]

    def test_one_whose_answer_waits_is_refused(self) -> None:
        """Is told of when it is gone, with its reason; of others nobody is told."""
        told: list[Refusal] = []
        deferred = DeferredActions(ErrorCounter(logging.getLogger("test.requests")))
        requests = RequestTracker(make_host(), deferred, on_refused=told.append)
        arrive(requests, "a", extra_args=TRACE, settings_=config(opt_in=False))
        awaited = {**TRACE, "glassbox_respond": 1, "glassbox_client": "0" * 24}
        arrive(requests, "b", extra_args=awaited, settings_=config(opt_in=False))
        assert told == []
        finish(requests, "a", "b")
        (refusal,) = told
        assert request_digest("b", "0" * 24) == refusal.request
        assert "clients may not ask for traces (requests.opt_in: false)" == refusal.why
        finish(requests, "b")
        assert [refusal] == told
        # Another stage of the pipeline may have the layers of this one, and trace it.
        arrive(requests, "c", extra_args={**awaited, "glassbox_layers": [7]})
        finish(requests, "c")
        assert [False, True] == [one.lacks_layers for one in told]

    def test_an_id_that_comes_again(self) -> None:
        """Gone and new in one step are two requests."""
        requests = tracker()
        arrive(requests, "a", extra_args=TRACE)
        output = scheduled_step([new_request("a", 3, None)], {"a": 3}, {"a"})
        assert not requests.begin_step(NO_RUNNER, output, config(), LOCAL_LAYERS)
        assert (requests.active(), len(requests.ended())) == ([], 1)

    @pytest.mark.parametrize(
        ("generated", "params", "status"),
        [
            ([1, 2, 3], {"max_tokens": 3}, "finished"),
            ([1, 2, 9], {"max_tokens": 10}, "finished"),
            ([1, 2, 8], {"max_tokens": 10, "stop_token_ids": [8]}, "finished"),
            ([1, 2, 3], {"max_tokens": 10, "stop": ["x"]}, "finished"),
            ([1, 2, -1], {"max_tokens": 10}, "finished"),
            ([1] * 995, {"max_tokens": 5000}, "finished"),
            ([1, 2, 3], {"max_tokens": 10}, "aborted"),
            ([], {"max_tokens": 10}, "aborted"),
        ],
    )
    def test_status(self, generated: list[int], params: dict[str, Any], status: str) -> None:
        """Finished, unless none of vLLM's own reasons to stop can have been."""
        requests = tracker()
        arrive(requests, "a", extra_args=TRACE)
        sampling = SimpleNamespace(**{"eos_token_id": 9, "stop_token_ids": [], "stop": [], **params})
        state = SimpleNamespace(prompt_token_ids=[0] * 5, output_token_ids=generated, sampling_params=sampling)
        finish(requests, "a", runner=SimpleNamespace(requests={"a": state}))
        (trace,) = requests.ended()
        record = trace.record()
        assert (record.status, record.num_generated) == (status, len(generated))
        assert record.end_time_s is not None
        assert record.end_time_s >= record.start_time_s

    def test_lost(self) -> None:
        """What runs when the worker ends."""
        requests = tracker()
        arrive(requests, "a", extra_args=TRACE)
        requests.close()
        (trace,) = requests.ended()
        assert trace.record().status == "lost"
        requests.release(trace)
        assert requests.ended() == []


def measure(
    requests: RequestTracker,
    runner: Any,
    batch_rows: list[tuple[int, int, int]],
    sampler: RowSampler | None = None,
    num_drafts: list[int] | None = None,
) -> np.ndarray:
    """A step's rows, as the observer does it: `(scheduled, computed, prompt length)` per batch row.

    The "measured" max_logit of a row is 1000 * its batch row + its query index, in all layers and heads.
    """
    batch = read_batch(runner, None, runner.metadata(batch_rows))
    traced, excluded = requests.marks(batch.req_ids)
    drafts = np.array(num_drafts or [0] * len(batch_rows), dtype=np.int64)
    rows, _ = (sampler or RowSampler(4096, 8)).select(
        batch.num_scheduled, batch.num_computed, batch.prompt_len, batch.query_start, num_drafts=drafts, traced=traced,
        excluded=excluded, sampled=False,
    )  # fmt: skip
    step = requests.trace_rows(runner, batch, rows, drafts)
    if step is not None:
        stats = np.zeros((len(rows), 2, NUM_STATISTICS + 1), dtype=np.float32)
        stats[..., 0] = (1000 * rows[:, ROW_BATCH] + rows[:, ROW_QUERY])[:, None]
        for layer in range(2):
            step.add_stats([layer], np.arange(len(rows)), stats[None])
        step.commit()
    return rows


class FakeRunner:
    """The V1 runner's batch, in any order."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.input_batch: Any = None

    def metadata(self, batch_rows: list[tuple[int, int, int]], ids: list[str] | None = None) -> Any:
        import torch

        scheduled, computed, prompt = (np.array(c, dtype=np.int32) for c in zip(*batch_rows, strict=True))
        self.input_batch = SimpleNamespace(
            num_reqs=len(batch_rows),
            num_computed_tokens_cpu=computed,
            num_prompt_tokens=prompt,
            req_ids=ids or self.ids,
        )
        starts = np.concatenate([[0], np.cumsum(scheduled)]).astype(np.int32)
        return SimpleNamespace(query_start_loc_cpu=torch.from_numpy(starts))

    ids: list[str]


class TestDrafts:
    """A request with a prompt of 5 tokens, of whose answer a step verifies 3 drafts."""

    def start(self) -> tuple[RequestTracker, FakeRunner]:
        requests, runner = tracker(), FakeRunner()
        runner.ids = ["a"]
        arrive(requests, "a", extra_args=TRACE)
        measure(requests, runner, [(5, 0, 5)])
        return requests, runner

    def step(self, requests: RequestTracker, runner: FakeRunner, computed: int, drafts: int) -> None:
        """A step from `computed` on, which vLLM's scheduler tells how many tokens were generated before."""
        continued = Continued(["a"], [computed], [computed + 1 - 5])
        output = scheduled_step(num_scheduled_tokens={"a": 1 + drafts}, scheduled_cached_reqs=continued)
        if requests.begin_step(runner, output, config(), LOCAL_LAYERS):
            measure(requests, runner, [(1 + drafts, computed, 5)], num_drafts=[drafts])

    def found(self, requests: RequestTracker) -> tuple[list[int], int]:
        (trace,) = requests.active() or requests.ended()
        record = trace.record()
        return record.positions.tolist(), record.num_generated

    def test_known_with_the_next_step(self) -> None:
        """Until then they are left out; then those that were kept are in, though nothing computes them again."""
        requests, runner = self.start()
        self.step(requests, runner, 5, 3)
        assert self.found(requests) == ([*range(5), 5], 2)
        self.step(requests, runner, 8, 3)  # two were kept
        assert self.found(requests) == ([*range(5), 5, 6, 7, 8], 5)

    def test_a_rejected_one_that_is_not_measured_again(self) -> None:
        """When a trace is full, rejected drafts are not taken for the tokens that came in their place."""
        requests, runner = self.start()
        self.step(requests, runner, 5, 3)
        (trace,) = requests.active()
        trace.nbytes = 10**9
        self.step(requests, runner, 6, 3)
        assert trace.truncated
        assert self.found(requests) == ([*range(5), 5], 2)
        self.step(requests, runner, 9, 3)
        state = SimpleNamespace(prompt_token_ids=[0] * 5, output_token_ids=[0] * 6, sampling_params=None)
        finish(requests, "a", runner=SimpleNamespace(requests={"a": state}))
        assert self.found(requests) == ([*range(5), 5], 6)

    @pytest.mark.parametrize("v2", [False, True])
    def test_preempted(self, v2: bool) -> None:
        """A resumed request's computed tokens say nothing of its drafts; the tokens that it has do."""
        requests, runner = self.start()
        self.step(requests, runner, 5, 3)
        new = [new_request("a", 5, TRACE, [0] * 7)] if v2 else []  # five, the first and one draft
        continued = Continued([] if v2 else ["a"], [] if v2 else [0], [] if v2 else [2], {"a"})
        output = scheduled_step(new, {"a": 7}, scheduled_cached_reqs=continued)
        requests.begin_step(runner, output, config(), LOCAL_LAYERS)
        assert self.found(requests) == ([*range(5), 5], 2)

    @pytest.mark.parametrize(("generated", "positions"), [(2, [5]), (4, [5, 6, 7]), (5, [5, 6, 7, 8])])
    def test_end(self, generated: int, positions: list[int]) -> None:
        """The answer's length tells of the last step's."""
        requests, runner = self.start()
        self.step(requests, runner, 5, 3)
        state = SimpleNamespace(prompt_token_ids=[0] * 5, output_token_ids=[0] * generated, sampling_params=None)
        finish(requests, "a", runner=SimpleNamespace(requests={"a": state}))
        assert self.found(requests) == ([*range(5), *positions], generated)

    def test_end_of_which_nothing_is_known(self) -> None:
        """They are left out."""
        requests, runner = self.start()
        self.step(requests, runner, 5, 3)
        finish(requests, "a")
        assert self.found(requests) == ([*range(5), 5], 2)


class TestLimits:
    def step(self, requests: RequestTracker, ids: list[str], position: int, settings_: GlassboxConfig) -> None:
        requests.begin_step(
            NO_RUNNER, scheduled_step(num_scheduled_tokens=dict.fromkeys(ids, 1)), settings_, LOCAL_LAYERS
        )
        runner = FakeRunner()
        runner.ids = ids
        measure(requests, runner, [(1, position, 5)] * len(ids))

    def test_of_one_request(self) -> None:
        """A trace that reaches max_trace_mb keeps what it has; the request costs nothing more."""
        requests, limits = tracker(layers=tuple(range(2)), num_heads=2), config(max_trace_mb=1)
        arrive(requests, "a", "b", extra_args=TRACE, settings_=limits)
        for position in range(5, 2000):
            self.step(requests, ["a"], position, limits)
        self.step(requests, ["b"], 5, limits)
        first, second = requests.active()
        record = first.record()
        assert record.truncated
        assert first.nbytes <= 1_000_000
        assert record.positions.tolist() == list(range(5, 5 + len(record.positions)))
        assert 400 < len(record.positions) < 1000
        assert not second.record().truncated
        traced = requests.marks(("a", "b"))[0]
        assert traced is not None
        assert traced.tolist() == [False, True]

    def test_of_all_together(self) -> None:
        """What waits to be written counts, so a disk that hangs does not fill the memory."""
        requests, limits = tracker(), config(max_trace_mb=4096, max_active_mb=1)
        arrive(requests, "a", extra_args=TRACE, settings_=limits)
        for position in range(5, 1000):
            self.step(requests, ["a"], position, limits)
        finish(requests, "a")
        arrive(requests, "b", extra_args=TRACE, settings_=limits)
        self.step(requests, ["b"], 5, limits)
        assert sum(t.nbytes for t in (*requests.active(), *requests.ended())) <= 1_000_000
        requests.release(requests.ended()[0])
        arrive(requests, "c", extra_args=TRACE, settings_=limits)
        self.step(requests, ["c"], 5, limits)
        assert requests.active()[-1].record().positions.tolist() == [5]

    def test_full_rows_are_counted_before_they_are_made(self) -> None:
        """A long context with whole attention vectors fills the limit with few rows."""
        requests, limits = tracker(), config(max_trace_mb=1)
        arrive(requests, "a", extra_args={**TRACE, "glassbox_rows": 1}, settings_=limits)
        trace = requests.active()[0]
        assert trace.row_nbytes(8000) > 4 * 8001 * 2
        assert trace.row_nbytes(1_000_000) < 4 * 8193 * 2 + 1000
        for position in range(8000, 8100):
            self.step(requests, ["a"], position, limits)
        assert trace.truncated
        assert 10 < len(trace.record().positions) < 20


class TestWholePrompts:
    """All rows of a prompt are asked for beside the row list."""

    WHOLE: ClassVar[dict[str, Any]] = {**TRACE, "glassbox_prompt": "all"}

    @staticmethod
    def step(
        requests: RequestTracker, computed: int, scheduled: int, prompt_len: int = 5, num_rows: int = 1, **more: Any
    ) -> Any:
        """What is traced of a step of request a alone, whose sampled row is the last one, or of no sampled row."""
        batch = SimpleNamespace(
            req_ids=("a",),
            num_computed=np.array([computed]),
            query_start=np.array([0, scheduled]),
            prompt_len=np.array([prompt_len]),
            num_scheduled=np.array([scheduled]),
        )
        rows = np.zeros((num_rows, 5), dtype=np.int32)
        rows[:, ROW_QUERY], rows[:, ROW_PHASE] = scheduled - 1, computed >= prompt_len
        return requests.trace_rows(NO_RUNNER, batch, rows, np.array([0]), **more)

    def ask(self, extra_args: dict[str, Any], settings_: Any = None, **host: Any) -> RequestTracker:
        requests = tracker(**{"head_size": 64, **host})
        arrive(requests, "a", extra_args=extra_args, settings_=settings_)
        return requests

    def test_in_chunks(self) -> None:
        """Each row once, computed again or not; then the rows of the list."""
        requests = self.ask({**self.WHOLE, "glassbox_spans": ["s=0:2"], "glassbox_signals": ["spectral"]})
        asked = []
        for computed, scheduled, new_from in ((0, 2, 0), (0, 4, 2), (4, 1, 4)):
            step = self.step(requests, computed, scheduled, new_from=[new_from])
            asked += [(p.token, p.position, p.num_rows, p.keys_from, p.grams, p.kept) for p in step.prompts]
            assert step.asked() is None
            step.commit()
        assert [(0, 0, 2, 0, True, False), (2, 2, 2, 2, True, False), (0, 4, 1, 4, True, False)] == asked
        step = self.step(requests, 5, 1)
        assert ([], [5], (0,), True) == (
            step.prompts, step.asked().positions.tolist(), step.asked().received, step.asked().queries
        )  # fmt: skip
        (trace,) = requests.active()
        record = trace.record()
        assert ([0, 1, 2, 3, 4], (NOT_MEASURED,)) == (record.positions.tolist(), record.notes), "no layer has answered"

    def test_in_a_step_without_listed_rows(self) -> None:
        """A chunk may have none of the sampled rows of its prompt."""
        requests = self.ask(self.WHOLE)
        step = self.step(requests, 0, 2, num_rows=0)
        assert ([2], None) == ([prompt.num_rows for prompt in step.prompts], step.asked())
        step.commit()
        assert [0, 1] == requests.active()[0].record().positions.tolist()

    def test_from_the_prefix_cache(self) -> None:
        """The trace says that rows are missing; their keys are read."""
        requests = self.ask({**TRACE, "glassbox_prompt": "new", "glassbox_signals": ["spectral"]})
        (asked,) = self.step(requests, 3, 2).prompts
        assert (3, 2, 0) == (asked.position, asked.num_rows, asked.keys_from)
        expected = "the prompt's first 3 positions came from the prefix cache, so they have no rows"
        assert (expected,) == requests.active()[0].record().notes

    def test_probed_rows_come_twice(self) -> None:
        """What is asked of the sampled rows alone is asked of these, and they are not summed again."""
        requests = self.ask({**self.WHOLE, "glassbox_top_k": 3})
        step = self.step(requests, 0, 5)
        assert (1, [4], ()) == (len(step.prompts), step.asked().positions.tolist(), step.asked().received)

    def test_tokens_that_see_others(self) -> None:
        """Nothing is kept of a prompt whose rows aren't causal."""
        requests = self.ask(self.WHOLE)
        mask = RowMask(np.array([True]), {}, np.array([4]))
        assert self.step(requests, 0, 5, mask=mask) is None
        record = requests.active()[0].record()
        assert (True, ("tokens of the prompt see others behind them, which is not measured",)) == (
            record.truncated, record.notes
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("reason", "extra_args", "limits", "host", "note"),
        [
            ("max_prompt_rows", WHOLE, {"max_prompt_rows": 4}, {},
             "it has 5 tokens, and requests.max_prompt_rows is 4"),
            ("prompt_memory", {**WHOLE, "glassbox_signals": ["spectral"]}, {"max_trace_mb": 1}, {"head_size": 256},
             r"all 5 need 4\.5 MB, and requests.max_trace_mb is 1, with .* MB left of max_active_mb; raise them"),
            ("signals", {**WHOLE, "glassbox_signals": ["spectral"]}, {}, {"head_size": 576},
             "singular values are for heads of at most 256 numbers, got 576"),
            ("signals", {**WHOLE, "glassbox_signals": ["cyclic"]}, {}, {"num_heads_total": 40},
             "queries and keys are not kept: signals on demand are for at most 32 layers x heads, got 80"),
            ("signals", {**WHOLE, "glassbox_signals": ["cyclic"]}, {}, {"head_size": 0},
             "queries and keys are not kept: the size of the heads isn't known"),
        ],
    )  # fmt: skip
    def test_bounds(
        self, reason: str, extra_args: dict[str, Any], limits: Any, host: Any, note: str, caplog: Any
    ) -> None:
        """What is beyond one is left out, in words; the request is traced without."""
        requests = self.ask(extra_args, config(**limits), **host)
        (trace,) = requests.active()
        assert {reason: 1} == refused(requests)
        (said,) = trace.record().notes
        assert re.search(note, said)
        assert re.search(f"Request a is traced, but not as it asked: .*{note}", caplog.text)
        step = self.step(requests, 0, 5)
        assert (reason == "signals") == bool(step is not None and step.prompts)
        record = trace.record()
        assert (0, 0) == (record.singular_values.size, record.keys.size)

    def test_too_long_for_keys(self) -> None:
        """An answer that grows beyond the bound loses them, and says so."""
        requests = self.ask({**self.WHOLE, "glassbox_signals": ["cyclic"]})
        self.step(requests, 0, 5).commit()
        (trace,) = requests.active()
        assert trace.sizes["dim"] == 64
        for position in (MAX_KEPT_TOKENS - 1, MAX_KEPT_TOKENS):
            self.step(requests, position, 1).commit()
        record = trace.record()
        assert (0, 0) == (record.queries.size, record.keys.size)
        assert (NOT_MEASURED, TOO_LONG_FOR_KEYS) == record.notes


class TestText:
    def test_only_if_configured(self) -> None:
        """Prompts are private: tokens are kept with include_text only."""
        for include, expected in ((False, []), (True, [1, 2, 3, 4, 5, 6, 7])):
            requests, settings_ = tracker(), config(include_text=include)
            arrive(requests, "a", extra_args=TRACE, settings_=settings_)
            runner = FakeRunner()
            runner.ids = ["a"]
            params = SimpleNamespace(eos_token_id=9, stop_token_ids=[], stop=[], max_tokens=2)
            state = SimpleNamespace(prompt_token_ids=[1, 2, 3, 4, 5], output_token_ids=[6], sampling_params=params)
            runner.requests["a"] = state
            measure(requests, runner, [(5, 0, 5)])
            state.output_token_ids.append(7)
            assert requests.active()[0].record().token_ids.tolist() == expected
            requests.begin_step(runner, scheduled_step(finished_req_ids={"a"}), settings_, LOCAL_LAYERS)
            state.output_token_ids.clear()
            assert requests.ended()[0].record().token_ids.tolist() == expected


class Machine(RuleBasedStateMachine):
    """vLLM's scheduler and batch, as glassbox sees them, with a plain account of whose each token is."""

    @initialize(prefill_rows=st.sampled_from([0, 1, 8]), v2=st.booleans())
    def start(self, prefill_rows: int, v2: bool) -> None:
        self.v2, self.prefill_rows = v2, prefill_rows
        self.requests = tracker()
        self.settings = config(max_active=3)
        self.sampler = RowSampler(4096, prefill_rows)
        self.alive: dict[str, dict[str, Any]] = {}
        self.gone: set[str] = set()
        self.count = 0
        # What the truth says was measured of each traced request: position -> "measured" number.
        self.truth: dict[str, dict[int, float]] = {}

    @rule(
        prompt_len=st.integers(1, 40),
        extra_args=st.sampled_from([None, TRACE, TRACE, {"glassbox": "off"}, {"glassbox": "?"}, {"x": 1}]),
        cached=st.integers(0, 39),
    )
    def arrive(self, prompt_len: int, extra_args: Any, cached: int) -> None:
        """A request enters the queue; `cached` tokens of its prompt will come from the prefix cache."""
        self.count += 1
        self.alive[f"{self.count}-0000000{self.count % 10}"] = {
            "prompt": prompt_len, "total": prompt_len, "computed": min(cached, prompt_len - 1), "new": True,
            "resumed": False, "extra": extra_args, "in_batch": False,
        }  # fmt: skip

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """A running request loses its cache and has to compute everything again."""
        request = self.alive[data.draw(st.sampled_from(sorted(self.alive)))]
        if not request["new"] and request["computed"]:
            request["computed"], request["resumed"] = 0, True

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """A request finishes or is aborted, running, preempted, or before it ever ran."""
        req_id = data.draw(st.sampled_from(sorted(self.alive)))
        if self.alive.pop(req_id)["new"]:
            self.truth.pop(req_id, None)
        self.gone.add(req_id)

    @rule(data=st.data(), budget=st.integers(1, 60))
    def step(self, data: st.DataObject, budget: int) -> None:
        """A step over some of the requests, in any order, in chunks."""
        order = data.draw(st.permutations(sorted(self.alive)))
        chosen = order[: data.draw(st.integers(0, len(order)))] if order else []
        scheduled: dict[str, int] = {}
        for req_id in chosen:
            request = self.alive[req_id]
            tokens = min(request["total"] - request["computed"], budget)
            if tokens > 0:
                scheduled[req_id], budget = tokens, budget - tokens
        new = []
        for req_id in scheduled:
            request = self.alive[req_id]
            if request["new"] or (self.v2 and request["resumed"]):
                prefill = [0] * request["total"] if self.v2 else None
                new.append(new_request(req_id, request["prompt"], request["extra"], prefill))
        fresh = [req_id for req_id in scheduled if self.alive[req_id]["new"]]
        for req_id in scheduled:
            self.alive[req_id] |= {"new": False, "resumed": False, "in_batch": True}
        runner = FakeRunner()
        self.requests.begin_step(runner, scheduled_step(new, scheduled, self.gone), self.settings, LOCAL_LAYERS)
        self.gone = set()
        active = {trace.internal_id for trace in self.requests.active()}
        for req_id in fresh:
            if req_id in active:
                self.truth[req_id] = {}
        if scheduled:
            self.run(runner, scheduled, data.draw(st.permutations(sorted(scheduled))))

    def run(self, runner: FakeRunner, scheduled: dict[str, int], order: list[str]) -> None:
        """The runner's batch has an order of its own."""
        runner.ids = order
        rows = [(scheduled[i], self.alive[i]["computed"], self.alive[i]["prompt"]) for i in order]
        measured = measure(self.requests, runner, rows, self.sampler)
        query, expected = 0, {}
        for batch_row, req_id in enumerate(order):
            request = self.alive[req_id]
            for offset in range(scheduled[req_id]):
                expected[query] = (req_id, batch_row, request["computed"] + offset, request["prompt"])
                query += 1
        batch = read_batch(runner, None, runner.metadata(rows, order))
        for row, at in zip(measured.tolist(), row_positions(batch, measured).tolist(), strict=True):
            req_id, batch_row, position, prompt_len = expected[row[ROW_QUERY]]
            owner = row[ROW_BATCH]
            assert (batch.req_ids[owner], at, batch.prompt_len[owner]) == (req_id, position, prompt_len)
            assert (position >= prompt_len) == (row[ROW_PHASE] & 1)
            assert row[ROW_SLOT] >= 0
            assert req_id in self.truth, "only traced requests are in a step that is not sampled"
            self.truth[req_id][position] = 1000 * batch_row + row[ROW_QUERY]
        for req_id in order:
            request = self.alive[req_id]
            request["computed"] += scheduled[req_id]
            if request["computed"] == request["total"]:
                if req_id in self.truth and request["total"] > request["prompt"]:
                    assert request["total"] - 1 in self.truth[req_id], "every generated token is measured"
                request["total"] += 1

    @invariant()
    def every_trace_has_its_own_rows(self) -> None:
        """Each number is the one that was measured for that token the last time."""
        if not hasattr(self, "requests"):
            return
        for trace in (*self.requests.active(), *self.requests.ended()):
            record, truth = trace.record(), self.truth.get(trace.internal_id, {})
            found = dict(zip(record.positions.tolist(), record.stats[:, 0, 0, 0].tolist(), strict=True))
            if trace.status == "active":
                assert found == truth
            assert found.items() <= truth.items()
            assert sorted(found) == list(found)
            assert (record.phases == (record.positions >= record.prompt_len)).all()

    @invariant()
    def nothing_leaks(self) -> None:
        """What glassbox knows of is alive, or gone since the last step; places are never more than allowed."""
        if not hasattr(self, "requests"):
            return
        requests = self.requests
        known = {*requests._active, *requests._off, *requests._refused}
        assert known <= self.alive.keys() | self.gone
        assert len(requests._active) <= 3
        assert sum(requests.counts()[1].values()) == len(requests.active()) + len(requests.ended())

    def teardown(self) -> None:
        """When everything has ended, nothing is left."""
        if not hasattr(self, "requests"):
            return
        finish(self.requests, *self.alive, *self.gone)
        for trace in self.requests.ended():
            self.requests.release(trace)
        requests = self.requests
        assert [] == [*requests._active, *requests._off, *requests._refused, *requests._ended]


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
