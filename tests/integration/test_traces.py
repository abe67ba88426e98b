"""Traces of a real model in vLLM equal transformers' eager attention: statistics, top positions, spans, rows, signals.

The engine has a KV cache for a few of its 16 requests and a small chunk size, so requests are preempted, resumed,
chunked and served from the prefix cache while they run side by side.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassbox import capture
from glassbox.adapter.offline_engine import deliver_ends
from glassbox.core.statistics import INDEX
from glassbox.signals import request_signals
from glassbox.store import rundir
from glassbox.store.snapshot import read_snapshots
from glassbox.store.trace_directory import TraceDirectory
from glassbox.store.trace_record import RequestTrace
from glassbox.store.trace_refusals import RefusalReader
from tests.attached import attached_hook, plugin, running_observer
from tests.integration.traced_engine import TracedEngine
from tests.integration.transformers_truth import EagerModel

pytestmark = pytest.mark.integration

# Both sides compute in float32 with their own order of summation.
MASS, HALF = 1e-4, 6e-4  # a float16 below 1 has steps of at most 2^-11
PREFILL_ROWS, CHUNK = 8, 64
TRACE: dict[str, Any] = {"glassbox": "trace"}


@pytest.fixture(scope="module")
def engine(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TracedEngine]:
    folder = tmp_path_factory.mktemp("glassbox")
    config = (
        "sample_rate: 0.25\n"
        f"sampling: {{max_rows_per_step: 4096, prefill_rows_per_request: {PREFILL_ROWS}}}\n"
        "requests: {include_text: true, max_trace_mb: 256, max_active_mb: 4096, keep_mb: 4096}\n"
        "export: {interval_s: 0.2}\n"
    )
    with plugin(folder, config) as patch:
        yield TracedEngine(demo_model_path, patch, chunk=CHUNK, blocks=20, max_model_len=256)


@pytest.fixture(scope="module")
def eager(demo_model_path: Path) -> EagerModel:
    return EagerModel(demo_model_path, torch.float32)


@pytest.fixture(scope="module")
def text(demo_model_path: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path)
    ids: list[int] = tokenizer.encode(
        "The attention of a language model decides which earlier words each new word is made from. "
        "Operators of a server seldom see it, although a broken template or a wrong rotary base shows there first. "
        "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n" * 4
    )
    return ids


def expected_prefill_positions(prompt_len: int) -> list[int]:
    if prompt_len <= PREFILL_ROWS:
        return list(range(prompt_len))
    return [-(-(k + 1) * prompt_len // PREFILL_ROWS) - 1 for k in range(PREFILL_ROWS)]


def assert_positions(trace: RequestTrace) -> None:
    """All decode rows, and the fixed choice of prompt positions, less those from the prefix cache (the first ones)."""
    prefill = expected_prefill_positions(trace.prompt_len)
    positions = trace.positions.tolist()
    decode = list(range(trace.prompt_len, trace.prompt_len + trace.num_generated - 1))
    assert positions[-len(decode) :] == decode if decode else True
    found = positions[: len(positions) - len(decode)]
    assert found
    assert found == prefill[-len(found) :]
    assert trace.decode().tolist() == [p >= trace.prompt_len for p in positions]


def assert_equals_truth(trace: RequestTrace, attention: np.ndarray) -> None:
    """Everything the trace holds, against attention [L, H, T, T] of the same tokens."""
    attention = attention[np.ix_(trace.layers, trace.heads)]
    k, spans = trace.options.top_k, trace.options.spans
    for t, position in enumerate(trace.positions.tolist()):
        p = attention[:, :, position, : position + 1].astype(np.float64)
        where = f"position {position} of {trace.request_id}"
        for name, expected in (
            ("top1_ratio", p.max(-1)),
            ("sink_ratio", p[..., :4].sum(-1)),
            ("local_ratio", p[..., -128:].sum(-1)),
        ):
            np.testing.assert_allclose(trace.stats[t, ..., INDEX[name]], expected, rtol=0, atol=MASS, err_msg=where)
        for s, span in enumerate(spans):
            expected = p[..., span.start : span.end].sum(-1)
            np.testing.assert_allclose(trace.span_mass[t, ..., s], expected, rtol=0, atol=MASS, err_msg=where)
        if trace.has_attention:
            np.testing.assert_allclose(trace.attention(t), p, rtol=0, atol=HALF, err_msg=where)
        if not k:
            continue
        count = min(k, position + 1)
        keys, mass = trace.topk_positions[t, ..., :count], trace.topk_mass[t, ..., :count]
        np.testing.assert_allclose(mass, -np.sort(-p, axis=-1)[..., :count], rtol=0, atol=MASS, err_msg=where)
        np.testing.assert_allclose(mass, np.take_along_axis(p, keys, -1), rtol=0, atol=MASS, err_msg=where)
        mean = p.mean(axis=(0, 1))
        np.testing.assert_allclose(trace.mean_topk_mass[t, :count], -np.sort(-mean)[:count], rtol=0, atol=MASS)
        np.testing.assert_allclose(
            trace.mean_topk_mass[t, :count], mean[trace.mean_topk_positions[t, :count]], rtol=0, atol=MASS
        )


def assert_signals(trace: RequestTrace, attention: np.ndarray) -> None:
    """The signals, from attention in numpy, written out by hand."""
    signals = request_signals(trace)
    rows = range(trace.prompt_len, trace.prompt_len + trace.num_generated - 1)
    entropy, lookback, top, own = [], [], [], []
    for position in rows:
        p = attention[:, :, position, : position + 1].astype(np.float64)
        entropy.append(-(p * np.log(np.maximum(p, 1e-300))).sum(-1) / np.log(position + 1))
        context, generated = p[..., : trace.prompt_len].mean(-1), p[..., trace.prompt_len :].mean(-1)
        lookback.append(context / (context + generated))
        top.append(p.max(-1))
        own.append(np.log(p[..., -1]))
    assert signals["decode_rows"] == len(rows)
    assert signals["entropy_mean"] == pytest.approx(np.mean(entropy), abs=1e-3)
    assert signals["lookback_mean"] == pytest.approx(np.mean(lookback), abs=1e-3)
    slope = np.polyfit(list(rows), [row.mean() for row in entropy], 1)[0]
    assert signals["entropy_trend"] == pytest.approx(100 * slope, abs=1e-2)
    slope = np.polyfit(list(rows), [row.mean() for row in lookback], 1)[0]
    assert signals["lookback_trend"] == pytest.approx(100 * slope, abs=1e-2)
    # A value within rounding of the bound may fall on either side.
    near = np.mean(np.abs(np.array(top) - 0.95) < MASS)
    assert signals["saturated_ratio"] == pytest.approx(np.mean(np.array(top) > 0.95), abs=near + 1e-9)
    for i, layer in enumerate(trace.layers):
        assert signals["llm_check"][layer] == pytest.approx(np.mean([row[i] for row in own]), rel=1e-3)
    last = attention[:, :, trace.prompt_len - 1].astype(np.float64)
    for span in trace.options.spans:
        assert signals["focus"][span.name] == pytest.approx(last[..., span.start : span.end].sum(-1).mean(), abs=MASS)


class TestMixedBatch:
    def test_sixteen_requests_with_preemption_chunks_and_prefix_cache(
        self, engine: TracedEngine, eager: EagerModel, text: list[int]
    ) -> None:
        """Each of the traced ones equals transformers in everything it asked for; the others left no trace."""
        prompts = [text[7 * i : 7 * i + 9 + 11 * i] for i in range(12)]
        prompts += [prompts[11], prompts[11] + text[:5], prompts[9][:70], prompts[3]]  # shared prefixes
        everything = {
            **TRACE,
            "glassbox_top_k": 5,
            "glassbox_spans": ["head=0:4", "middle=4:30", "answer=9:400"],
            "glassbox_rows": 1,
        }
        chosen = {**TRACE, "glassbox_layers": [3, 0, 29], "glassbox_heads": [8, 1], "glassbox_top_k": 3}
        kinds: list[dict[str, Any] | None] = [everything, None, TRACE, {"glassbox": "off"}, chosen]
        extra_args = [kinds[i % 5] for i in range(16)]
        before = engine.preemptions
        outputs = engine.serve(prompts, [20 + i for i in range(16)], extra_args)
        assert engine.preemptions > before, "the cache must be too small for this test to mean anything"
        traces = engine.traces(outputs)
        assert sum(len(found) for found in traces.values()) == sum(
            (x or {}).get("glassbox") == "trace" for x in extra_args
        )
        for prompt, output, extra in zip(prompts, outputs, extra_args, strict=True):
            found = traces[output.request_id]
            if (extra or {}).get("glassbox") != "trace":
                assert found == []
                continue
            (trace,) = found
            tokens = [*prompt, *output.outputs[0].token_ids]
            assert (trace.status, trace.why, trace.truncated) == ("finished", "opt_in", False)
            assert trace.token_ids.tolist() == tokens
            assert (trace.prompt_len, trace.num_generated) == (len(prompt), len(output.outputs[0].token_ids))
            assert_positions(trace)
            attention = eager.attention(tokens)
            assert_equals_truth(trace, attention)
            if extra is everything:
                assert len(trace.layers) == 30
                assert_signals(trace, attention)
            if extra is chosen:
                assert (trace.layers, trace.heads) == ((0, 3, 29), (1, 8))
        assert engine.tracker.active() == engine.tracker.ended() == []
        assert attached_hook().errors.counts() == {}

    def test_answers_of_one_prompt(self, engine: TracedEngine, eager: EagerModel, text: list[int]) -> None:
        """With n > 1 each answer has its own rows."""
        (output,) = engine.serve([text[:20]], [12], [{**TRACE, "glassbox_rows": 1, "glassbox_layers": [0, 12]}], n=3)
        traces = engine.traces([output])[output.request_id]
        assert len(traces) == 3
        assert len({trace.internal_id for trace in traces}) == 3
        answers = sorted([*text[:20], *answer.token_ids] for answer in output.outputs)
        assert sorted(trace.token_ids.tolist() for trace in traces) == answers
        for trace in traces:
            assert_equals_truth(trace, eager.attention(trace.token_ids.tolist()))

    def test_aborted(self, engine: TracedEngine, text: list[int]) -> None:
        """A request that is aborted amid its answer is said to be, and is gone from memory."""
        from vllm import SamplingParams

        llm_engine = engine.llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, extra_args=TRACE)
        llm_engine.add_request("stop-me", {"prompt_token_ids": text[:30]}, params)
        for _ in range(5):
            llm_engine.step()
        llm_engine.abort_request(["stop-me"])
        deliver_ends(engine.llm)
        assert engine.tracker.active() == []
        deadline = time.monotonic() + 120
        while engine.tracker.ended() and time.monotonic() < deadline:
            time.sleep(0.05)
        trace = TraceDirectory(rundir.run_dir()).get("stop-me")
        assert trace is not None
        assert trace.status == "aborted"
        assert 0 < trace.num_generated < 100
        assert_positions(trace)

    def test_refused_while_an_answer_waits(
        self, engine: TracedEngine, text: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The worker tells why, for the API server that waits; nothing is told of a request whose answer doesn't."""
        tracker = engine.tracker
        with monkeypatch.context() as patch:
            patch.setattr(tracker, "_host", replace(tracker._host, unobserved="a test"))
            engine.serve([text[:9], text[:8]], [2, 2], [{**TRACE, "glassbox_respond": 1}, TRACE])
        reader, deadline = RefusalReader(rundir.run_dir()), time.monotonic() + 120
        while not (told := [one for worker in reader.read() for one in worker.refusals.values()]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert ["the attention of this model is not observed (a test)"] == [refusal.why for refusal in told]


class TestStatisticsStayOnesOfTheSample:
    def test_traced_and_excluded_rows(self, engine: TracedEngine, text: list[int]) -> None:
        """Row counts are those of sampled steps, whoever is traced; a request that is off counts nowhere."""
        observer = running_observer()

        def rows_of(extra: dict[str, Any] | None) -> tuple[int, int]:
            engine.llm.reset_prefix_cache()
            before, sampled = observer.measurer.copy(0.0).rows, observer.counters.sampled_steps
            engine.serve([text[100:130]] * 2, [40, 40], [extra, None])
            return int((observer.measurer.copy(0.0).rows - before).sum()), observer.counters.sampled_steps - sampled

        # Whole cycles of the step sampler, so that equal traffic has equal samples.
        plain = [rows_of(None) for _ in range(4)]
        traced = [rows_of(TRACE) for _ in range(4)]
        off = [rows_of({"glassbox": "off"}) for _ in range(4)]
        assert sum(plain[i][0] for i in range(4)) == sum(traced[i][0] for i in range(4))
        assert 2 * sum(off[i][0] for i in range(4)) == sum(plain[i][0] for i in range(4))


class TestRowsOfRequests:
    """Each prompt is counted once, and each generated token that was computed; every step is measured here."""

    @pytest.fixture
    def counted(self, engine: TracedEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[int]]]:
        """Rows of each phase since the test began, of any layer and head."""
        observer = running_observer()
        config = observer._config.model_copy(update={"sample_rate": 1.0})
        monkeypatch.setattr(observer, "_read_config", lambda: config)
        engine.llm.reset_prefix_cache()
        before = observer.measurer.copy(0.0).rows

        def count() -> list[int]:
            rows = observer.measurer.copy(0.0).rows - before
            assert (rows == rows[0, 0]).all()
            return [int(n) for n in rows[0, 0]]

        yield count
        assert observer.counters.dropped_rows == {}

    def test_preempted(self, engine: TracedEngine, text: list[int], counted: Callable[[], list[int]]) -> None:
        """What a resumed request computes again is not counted again, of its prompt or of its answer."""
        prompts = [[i, *text[7 * i : 7 * i + 9 + 11 * i]] for i in range(12)]
        lengths = [20 + 5 * i for i in range(12)]
        before = engine.preemptions
        engine.serve(prompts, lengths, [None] * 12)
        assert engine.preemptions > before, "the cache must be too small for this test to mean anything"
        assert counted() == [
            sum(min(PREFILL_ROWS, len(prompt)) for prompt in prompts), sum(length - 1 for length in lengths)
        ]  # fmt: skip

    def test_beams(self, engine: TracedEngine, text: list[int], counted: Callable[[], list[int]]) -> None:
        """Each step of a beam search is a request; its newest token is a decode row, and nothing else of it is one."""
        from vllm.sampling_params import BeamSearchParams

        prompt, width, steps = text[:50], 3, 5
        engine.llm.beam_search(
            [{"prompt_token_ids": prompt}], BeamSearchParams(beam_width=width, max_tokens=steps, ignore_eos=True)
        )
        assert counted() == [PREFILL_ROWS, width * (steps - 1)]


class TestSnapshots:
    def test_one_within_the_last_step(
        self, engine: TracedEngine, text: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A snapshot that falls into a step lacks its rows; the next one has them, though no step follows."""
        worker = attached_hook().worker
        assert worker is not None
        measurer = worker.observer.measurer
        finish, written = measurer.finish, []

        def snapshot_first() -> None:
            worker.write_if_changed()
            written.append(worker.snapshot().rows.sum())
            finish()

        monkeypatch.setattr(measurer, "finish", snapshot_first)
        counters = worker.observer.counters
        sampled = counters.sampled_steps
        while counters.sampled_steps == sampled:  # a step that only checks outputs ends here too, without rows
            engine.serve([text[:16]], [1], [None])  # a request of one step; one in four is measured
        worker.write_if_changed()
        (snapshot,) = read_snapshots(rundir.run_dir())
        assert snapshot.rows.sum() == measurer.copy(0.0).rows.sum() > written[-1]


class TestCapture:
    def test_tables(self, engine: TracedEngine, eager: EagerModel, text: list[int]) -> None:
        """The tables hold what the traces hold, a line for each number."""
        import pyarrow.compute as pc
        from vllm import SamplingParams

        found = capture(
            engine.llm,
            [{"prompt_token_ids": text[:12]}, {"prompt_token_ids": text[50:80]}],
            SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
            layers=[0, 7],
            heads=range(4),
            top_k=3,
            spans={"start": (0, 4)},
            rows=True,
        )
        assert found.requests["num_generated"].to_pylist() == [6, 6]
        assert found.requests["text"].to_pylist() == [output.outputs[0].text for output in found.outputs]
        for i, (trace,) in enumerate(found.traces):
            attention = eager.attention(trace.token_ids.tolist())
            rows = found.rows.filter(pc.equal(found.rows["request"], i)).to_pylist()
            assert len(rows) == len(trace.positions) * 2 * 4
            for row in rows:
                p = attention[row["layer"], row["head"], row["position"], : row["position"] + 1]
                assert row["top1_ratio"] == pytest.approx(p.max(), abs=MASS)
                assert (row["phase"], row["nonfinite"]) == (
                    "decode" if row["position"] >= trace.prompt_len else "prefill",
                    False,
                )
                assert (row["lookback_ratio"] is None) == (row["phase"] == "prefill")
            tokens = found.tokens.filter(pc.equal(found.tokens["request"], i)).to_pylist()
            assert [line["position"] for line in tokens] == trace.positions.tolist()
            for line in tokens:
                shares = [row["sink_ratio"] for row in rows if row["position"] == line["position"]]
                assert line["sink_ratio"] == pytest.approx(sum(shares) / len(shares), rel=1e-6)
                assert line["token_id"] == trace.token_ids[line["position"]]
            for line in found.spans.filter(pc.equal(found.spans["request"], i)).to_pylist():
                p = attention[line["layer"], line["head"], line["position"]]
                assert line["mass"] == pytest.approx(p[:4].sum(), abs=MASS)
            for line in found.top_k.filter(pc.equal(found.top_k["request"], i)).to_pylist():
                mean = attention[[0, 7]][:, :4].mean(axis=(0, 1))
                p = mean if line["layer"] is None else attention[line["layer"], line["head"]]
                assert line["mass"] == pytest.approx(p[line["position"], line["key"]], abs=MASS)
            for line in found.attention.filter(pc.equal(found.attention["request"], i)).to_pylist():
                p = attention[line["layer"], line["head"], line["position"], : line["position"] + 1]
                np.testing.assert_allclose(line["attention"], p, rtol=0, atol=HALF)
                assert line["first_key"] == 0

    def test_bad_options(self, engine: TracedEngine) -> None:
        """They are an error before anything is generated."""
        with pytest.raises(ValueError, match="glassbox_top_k must be a whole number from 0 to 32, got 99"):
            capture(engine.llm, ["x"], top_k=99)
        with pytest.raises(ValueError, match="spans must be one for all or one per prompt, got 2 for 1 prompts"):
            capture(engine.llm, ["x"], spans=[{"a": (0, 1)}, {"a": (0, 1)}])
