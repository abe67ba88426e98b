"""Whole prompts, and what rows add up to, of a real model in vLLM equal transformers' eager attention.

The engine has a KV cache for some of its 16 requests and a chunk size smaller than most prompts, so requests are
chunked, preempted, resumed and served from the prefix cache while they run side by side.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassbox.adapter.offline_engine import deliver_ends
from glassbox.core.statistics import INDEX
from glassbox.store import rundir
from glassbox.store.trace_directory import TraceDirectory
from glassbox.store.trace_record import RequestTrace
from tests.attached import attached_hook, plugin, running_observer
from tests.integration.transformers_truth import EagerModel, WholeTruth, whole_truth

pytestmark = pytest.mark.integration

# Both sides compute in float32 with their own order of summation; a mass is at most 1.
MASS, LOGPROB, RELATIVE = 1e-4, 2e-3, 1e-3
CHUNK, BLOCK = 256, 32
ALL: dict[str, Any] = {"glassbox": "trace", "glassbox_prompt": "all"}
NEW: dict[str, Any] = {"glassbox": "trace", "glassbox_prompt": "new", "glassbox_signals": ["spectral", "rauq"]}
SIGNALS: dict[str, Any] = {**ALL, "glassbox_signals": ["spectral", "laplacian", "rauq"], "glassbox_spans": ["a=0:4"]}
ON_DEMAND: dict[str, Any] = {
    **ALL, "glassbox_signals": ["routing"], "glassbox_layers": [0, 29], "glassbox_heads": [1, 4, 8]
}  # fmt: skip


class Engine:
    """An in-process vLLM with the plugin, whose preemptions are counted."""

    def __init__(self, model: Path, patch: pytest.MonkeyPatch) -> None:
        from vllm import LLM
        from vllm.v1.core.sched.scheduler import Scheduler

        self.preemptions = 0
        original = Scheduler._preempt_request

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return original(*args, **kwargs)

        patch.setattr(Scheduler, "_preempt_request", counting)
        self.llm = LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1600,
            block_size=BLOCK,
            num_gpu_blocks_override=56,  # 1792 tokens
            max_num_batched_tokens=CHUNK,
            max_num_seqs=16,
            enable_prefix_caching=True,
            seed=0,
        )

    def serve(
        self, prompts: list[list[int]], max_tokens: list[int], extra_args: list[dict[str, Any] | None], n: int = 1
    ) -> list[Any]:
        """All prompts at once; vLLM's outputs."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                SamplingParams(temperature=float(n > 1), n=n, max_tokens=tokens, ignore_eos=True, extra_args=extra)
                for tokens, extra in zip(max_tokens, extra_args, strict=True)
            ],
            use_tqdm=False,
        )
        deliver_ends(self.llm)
        return list(outputs)

    def traces(self, outputs: list[Any]) -> list[list[RequestTrace]]:
        """Of ended requests, once all of them lie in the run directory."""
        directory = TraceDirectory(rundir.run_dir())
        ids = {output.request_id for output in outputs}
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            summaries = [s for s in directory.summaries() if s.request_id in ids]
            requests = running_observer().requests
            if not any(s.status == "active" for s in summaries) and not requests.ended():
                break
            time.sleep(0.05)
        return [directory.traces(output.request_id) for output in outputs]


@pytest.fixture(scope="module")
def engine(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("glassbox")
    config = (
        "sample_rate: 0.25\n"
        "requests: {include_text: true, max_trace_mb: 256, max_active_mb: 4096, keep_mb: 4096}\n"
        "export: {interval_s: 0.2}\n"
    )
    with plugin(folder, config) as patch:
        yield Engine(demo_model_path, patch)


@pytest.fixture(scope="module")
def eager(demo_model_path: Path) -> EagerModel:
    return EagerModel(demo_model_path, torch.float32)


@pytest.fixture(scope="module")
def text(demo_model_path: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path)
    numbered = (
        f"{i}. The attention of a language model decides which earlier words each new word is made from. "
        f"Operators of server {3 * i} seldom see it, although a broken template shows there first.\n"
        for i in range(60)
    )
    ids: list[int] = tokenizer.encode("".join(numbered))
    return ids


def assert_equals_truth(trace: RequestTrace, truth: WholeTruth) -> None:
    """Everything of whole requests that the trace holds."""
    at = np.ix_(trace.layers, trace.heads)
    rows = trace.positions
    end = trace.prompt_len + trace.num_generated - 1
    assert rows.tolist() == list(range(int(rows[0]), end))
    for found, expected in (
        (trace.previous_mass, truth.previous),
        (np.exp(trace.stats[..., INDEX["self_logprob"]]), np.exp(truth.self_logprob)),
    ):
        of_rows = np.moveaxis(expected[at], 2, 0)[rows]
        np.testing.assert_allclose(found, of_rows, rtol=0, atol=MASS, err_msg=trace.request_id)
    np.testing.assert_allclose(trace.received, truth.received[at], rtol=RELATIVE, atol=MASS)
    if "singular_values" in trace.options.arrays:
        places = [(0, 0), (len(trace.layers) // 2, 1), (-1, -1)]
        for i, h in places:
            expected = truth.singular_values(trace.layers[i], trace.heads[h], int(rows[0]))
            # Of fewer rows there are fewer.
            expected = np.pad(expected, (0, 16))[:16]
            found = trace.singular_values[i, h]
            np.testing.assert_allclose(found[:4], expected[:4], rtol=RELATIVE, err_msg=trace.request_id)
            np.testing.assert_allclose(found, expected, rtol=RELATIVE, atol=1e-4 * expected[0])
    if "keys" in trace.options.arrays:
        scale = np.abs(truth.keys[at]).max()
        np.testing.assert_allclose(trace.queries, np.moveaxis(truth.queries[at], 2, 0), rtol=0, atol=MASS * scale)
        np.testing.assert_allclose(trace.keys, np.moveaxis(truth.keys[at], 2, 0), rtol=0, atol=MASS * scale)
        assert trace.score_params[..., 0] == pytest.approx(64**-0.5)
        assert (trace.score_params[..., 1:3] == 0).all()
        assert np.isnan(trace.score_params[..., 3]).all()
    if "logprobs" in trace.options.arrays:
        np.testing.assert_allclose(trace.logprobs, truth.logprobs[trace.prompt_len - 1 :], rtol=0, atol=LOGPROB)


class TestMixedBatch:
    def test_sixteen_requests_with_preemption_and_chunks(
        self, engine: Engine, eager: EagerModel, text: list[int]
    ) -> None:
        """Prompts of 5 to 1,500 tokens; no row of them enters the histograms because of its trace."""
        lengths = [5, 33, 1500, 64, 90, 128, 200, 257, 300, 12, 400, 20, 600, 70, 31, 32]
        prompts = [[i, *text[3 * i : 3 * i + n - 1]] for i, n in enumerate(lengths)]
        extra_args: list[dict[str, Any] | None] = [SIGNALS if i % 4 == 2 else ON_DEMAND for i in range(16)]
        extra_args[3::4] = [None] * 4
        before = engine.preemptions
        outputs = engine.serve(prompts, [12 + i for i in range(16)], extra_args)
        assert engine.preemptions > before, "the cache must be too small for this test to mean anything"
        for prompt, output, extra, found in zip(prompts, outputs, extra_args, engine.traces(outputs), strict=True):
            assert output.outputs[0].logprobs is None
            if extra is None:
                assert found == []
                continue
            (trace,) = found
            assert ((), False) == (trace.notes, trace.truncated)
            assert trace.positions[0] == 0
            assert_equals_truth(trace, whole_truth(eager, [*prompt, *output.outputs[0].token_ids]))
        assert attached_hook().errors.counts() == {}


class TestPrefixCache:
    def test_all_and_new(self, engine: Engine, eager: EagerModel, text: list[int]) -> None:
        """With `all` nothing comes from the cache, not even of a request that said so before; with `new` it does, which
        the trace says."""
        prompt = text[300:470]
        engine.serve([prompt], [4], [None])
        outputs = [engine.serve([prompt], [6], [extra])[0] for extra in (SIGNALS, SIGNALS, NEW)]
        again, second, new = (found[0] for found in engine.traces(outputs))
        tokens = [*prompt, *outputs[0].outputs[0].token_ids]
        assert [0, 0, 160] == [trace.positions[0] for trace in (again, second, new)]
        assert ((), ()) == (again.notes, second.notes)
        assert ("the prompt's first 160 positions came from the prefix cache, so they have no rows",) == new.notes
        for trace, first_row in ((again, 0), (second, 0), (new, 160)):
            assert_equals_truth(trace, whole_truth(eager, tokens, first_row))

    def test_answers_of_one_prompt(self, engine: Engine, eager: EagerModel, text: list[int]) -> None:
        """With n > 1 each answer has its own salt."""
        outputs = engine.serve([text[500:600]], [5], [SIGNALS], n=2)
        (traces,) = engine.traces(outputs)
        assert 2 == len(traces)
        for trace in traces:
            assert_equals_truth(trace, whole_truth(eager, trace.token_ids.tolist()))
