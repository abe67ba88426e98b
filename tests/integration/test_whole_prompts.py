"""Whole prompts, and what rows add up to, of a real model in vLLM equal transformers' eager attention.

The engine has a KV cache for some of its 16 requests and a chunk size smaller than most prompts, so requests are
chunked, preempted, resumed and served from the prefix cache while they run side by side.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassbox import Extractor
from glassbox.cli.commands.heads import focus_of
from glassbox.core.signal_table import SIGNAL_NAMES, signal_row
from glassbox.core.statistics import INDEX
from glassbox.signals.registry import signal_values
from glassbox.signals.values import SignalValues
from glassbox.store.trace_record import RequestTrace
from glassbox.view.measured import ViewError
from glassbox.view.samples.samples_file import Sample, SpanPlace
from tests import signal_truth
from tests.attached import attached_hook, plugin
from tests.integration.traced_engine import TracedEngine
from tests.integration.transformers_truth import EagerModel, WholeTruth, whole_truth

pytestmark = pytest.mark.integration

# Both sides compute in float32 with their own order of summation; a mass is at most 1.
MASS, LOGPROB, RELATIVE = 1e-4, 2e-3, 1e-3
USER = {"role": "user", "content": "Hello"}
CHUNK = 256
ALL: dict[str, Any] = {"glassbox": "trace", "glassbox_prompt": "all"}
NEW: dict[str, Any] = {"glassbox": "trace", "glassbox_prompt": "new", "glassbox_signals": ["spectral", "rauq"]}
SIGNALS: dict[str, Any] = {
    **ALL, "glassbox_signals": ["spectral", "asymmetry", "laplacian", "rauq"], "glassbox_spans": ["a=0:4"]
}  # fmt: skip
ON_DEMAND: dict[str, Any] = {
    **ALL, "glassbox_signals": ["routing"], "glassbox_layers": [0, 29], "glassbox_heads": [1, 4, 8]
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TracedEngine]:
    folder = tmp_path_factory.mktemp("glassbox")
    config = (
        "sample_rate: 0.25\n"
        "requests: {include_text: true, max_trace_mb: 256, max_active_mb: 4096, keep_mb: 4096}\n"
        "export: {interval_s: 0.2}\n"
    )
    with plugin(folder, config) as patch:
        yield TracedEngine(demo_model_path, patch, chunk=CHUNK, blocks=56, max_model_len=1600)


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
        self, engine: TracedEngine, eager: EagerModel, text: list[int]
    ) -> None:
        """Prompts of 5 to 1,500 tokens; no row of them enters the histograms because of its trace."""
        lengths = [5, 33, 1500, 64, 90, 128, 200, 257, 300, 12, 400, 20, 600, 70, 31, 32]
        prompts = [[i, *text[3 * i : 3 * i + n - 1]] for i, n in enumerate(lengths)]
        extra_args: list[dict[str, Any] | None] = [SIGNALS if i % 4 == 2 else ON_DEMAND for i in range(16)]
        extra_args[3::4] = [None] * 4
        before = engine.preemptions
        outputs = engine.serve(prompts, [12 + i for i in range(16)], extra_args)
        assert engine.preemptions > before, "the cache must be too small for this test to mean anything"
        for prompt, output, extra, found in zip(
            prompts, outputs, extra_args, engine.traces(outputs).values(), strict=True
        ):
            assert output.outputs[0].logprobs is None
            if extra is None:
                assert found == []
                continue
            (trace,) = found
            assert ((), False) == (trace.notes, trace.truncated)
            assert trace.positions[0] == 0
            truth = whole_truth(eager, [*prompt, *output.outputs[0].token_ids])
            assert_equals_truth(trace, truth)
            assert_signals(trace, truth)
        assert attached_hook().errors.counts() == {}


class TestPrefixCache:
    def test_all_and_new(self, engine: TracedEngine, eager: EagerModel, text: list[int]) -> None:
        """With `all` nothing comes from the cache, not even of a request that said so before; with `new` it does, which
        the trace says."""
        prompt = text[300:470]
        engine.serve([prompt], [4], [None])
        outputs = [engine.serve([prompt], [6], [extra])[0] for extra in (SIGNALS, SIGNALS, NEW)]
        again, second, new = (found[0] for found in engine.traces(outputs).values())
        tokens = [*prompt, *outputs[0].outputs[0].token_ids]
        assert [0, 0, 160] == [trace.positions[0] for trace in (again, second, new)]
        assert ((), ()) == (again.notes, second.notes)
        assert ("the prompt's first 160 positions came from the prefix cache, so they have no rows",) == new.notes
        for trace, first_row in ((again, 0), (second, 0), (new, 160)):
            assert_equals_truth(trace, whole_truth(eager, tokens, first_row))

    def test_answers_of_one_prompt(self, engine: TracedEngine, eager: EagerModel, text: list[int]) -> None:
        """With n > 1 each answer has its own salt."""
        outputs = engine.serve([text[500:600]], [5], [SIGNALS], n=2)
        (traces,) = engine.traces(outputs).values()
        assert 2 == len(traces)
        for trace in traces:
            assert_equals_truth(trace, whole_truth(eager, trace.token_ids.tolist()))


def assert_signals(trace: RequestTrace, truth: WholeTruth) -> None:
    """Those that it can have, at its last place, against the whole matrix of attention; short ones on demand, too."""
    layer, head = trace.layers[-1], trace.heads[-1]
    q, k = (x[layer, head].astype(np.float64) for x in (truth.queries, truth.keys))
    scores = q @ k.T / 8  # a head's size is 64
    weights = np.tril(np.exp(scores - scores.max(axis=1, keepdims=True)))
    p = weights / weights.sum(axis=1, keepdims=True)
    expected = {
        "selfattn": {"attn_diag_logmean": truth.self_logprob[layer, head].mean()},
        "laplacian": {"eigval_0": (p.sum(axis=0) - np.diag(p)).max()},
    }
    if "singular_values" in trace.options.arrays:
        expected["spectral"] = {"sv1": truth.singular_values(layer, head)[0]}
    if "keys" in trace.options.arrays and len(p) < 300:
        expected |= {"tracker": signal_truth.tracker(p), "magnetic": signal_truth.magnetic(scores)}
    if "received_squares" in trace.options.arrays:
        expected["asymmetry"] = signal_truth.asymmetry(p)
    for name, found in signal_values(trace, expected).items():
        assert found.refused == ""
        for value, number in expected[name].items():
            power = 2 if value in {"G", "Gamma", "C"} else 1  # these are roots of differences
            here = float(found.by_place[value][-1, -1]) ** power
            assert here == pytest.approx(number**power, rel=RELATIVE, abs=MASS), f"{name}_{value} of {trace.request_id}"


class TestSignals:
    def test_all_of_one_request(self, engine: TracedEngine, eager: EagerModel, text: list[int]) -> None:
        """Each value at each place, from dense float64 matrices of transformers' queries, keys and attention."""
        asked = {
            **ON_DEMAND,
            "glassbox_signals": list(SIGNAL_NAMES),
            "glassbox_spans": ["instruction=0:9", "answer=40:60"],
        }
        outputs = engine.serve([text[600:640]], [12], [asked])
        ((trace,),) = engine.traces(outputs).values()
        tokens = [*text[600:640], *outputs[0].outputs[0].token_ids]
        truth, attention = whole_truth(eager, tokens), eager.attention(tokens)[..., :-1, :-1].astype(np.float64)
        found = signal_values(trace, SIGNAL_NAMES)
        assert dict.fromkeys(SIGNAL_NAMES, "") == {name: values.refused for name, values in found.items()}
        for i, layer in enumerate(trace.layers):
            for h, head in enumerate(trace.heads):
                p, q, k = attention[layer, head], truth.queries[layer, head], truth.keys[layer, head]
                for name, expected in expected_values(p, q, k, trace).items():
                    for value, number in expected.items():
                        power = 2 if value in {"G", "Gamma", "C"} else 1  # these are roots of differences
                        here = float(found[name].by_place[value][i, h]) ** power
                        where = f"{name}_{value}_L{layer}_H{head}"
                        assert here == pytest.approx(number**power, rel=RELATIVE, abs=MASS), where
                row_norms = found["asymmetry"].by_token["row_norm"][:, i, h]
                np.testing.assert_allclose(row_norms**2, signal_truth.row_norms(p) ** 2, rtol=RELATIVE, atol=MASS)
        assert_rauq(found["rauq"], truth, attention, trace)

    def test_holes(self, engine: TracedEngine, text: list[int]) -> None:
        """Of a prompt that came from the prefix cache in part: what needs all rows says so, the others have values."""
        prompt = text[700:800]
        engine.serve([prompt], [1], [None])
        asked = {**ON_DEMAND, "glassbox_prompt": "new", "glassbox_signals": list(SIGNAL_NAMES)}
        ((trace,),) = engine.traces(engine.serve([prompt], [4], [asked])).values()
        found = signal_values(trace, SIGNAL_NAMES)
        for name, values in found.items():
            if signal_row(name).prompt and name != "heavy_hitters":
                assert "rows of 96 of 103 tokens are missing" in values.refused
        assert 7 / 103 == found["heavy_hitters"].of_request["rows_ratio"]
        assert "" == found["rauq"].refused == found["lookback"].refused

    def test_focus_of_prompts(self, engine: TracedEngine, eager: EagerModel) -> None:
        """What `glassbox heads` finds its heads by: the last token's attention to the instruction."""
        text, chat = "Translate into French: the harbour", ({"role": "system", "content": "Be short."}, USER)
        by_text, by_message = (
            SpanPlace("instruction", text="Translate into French:"),
            SpanPlace("instruction", message=0),
        )
        prompts = [
            Sample(0, "1", text, None, None, False, None, (by_text,)),
            Sample(1, "2", None, chat, None, True, None, (by_message,)),
        ]
        extractor = Extractor(engine.llm, max_tokens=1)  # type: ignore[arg-type]
        focus, layers, heads = focus_of(extractor, prompts)
        assert (tuple(range(30)), tuple(range(9))) == (layers, heads)
        tokenizer = engine.llm.get_tokenizer()
        rendered = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        for whole, instruction, found in zip((text, rendered), (by_text.text, "Be short."), focus, strict=True):
            tokens, wanted = tokenizer.encode(whole), tokenizer.encode(instruction)
            start = next(i for i in range(len(tokens)) if tokens[i : i + len(wanted)] == wanted)
            expected = eager.attention(tokens)[:, :, -1, start : start + len(wanted)].sum(-1)
            np.testing.assert_allclose(found, expected, rtol=0, atol=MASS)

    def test_focus_on_what_a_prompt_lacks(self, engine: TracedEngine) -> None:
        """Says of which prompt, and why."""
        extractor = Extractor(engine.llm, max_tokens=1)  # type: ignore[arg-type]
        for place, message in (
            (SpanPlace("instruction", text="dog"), "must be a text that stands in the prompt once, it does 0 times"),
            (SpanPlace("instruction", tokens=(0, 99)), "spans instruction must end within the prompt's"),
        ):
            with pytest.raises(ViewError, match=f"^prompt x: .*{message}"):
                focus_of(extractor, [Sample(0, "x", "a cat", None, None, False, None, (place,))])


def expected_values(p: np.ndarray, q: np.ndarray, k: np.ndarray, trace: RequestTrace) -> dict[str, dict[str, float]]:
    """Of one head with attention p [T, T]; by the definitions of tests/signal_truth.py."""
    own, received = np.diag(p), p.sum(axis=0)
    answer = [lookback(p[row, : row + 1], trace.prompt_len) for row in range(trace.prompt_len, len(p))]
    scores = q.astype(np.float64) @ k.astype(np.float64).T
    order = np.argsort(-received)[:10]
    last = p[trace.prompt_len - 1]
    return {
        "spectral": signal_truth.spectrum(scores),
        "asymmetry": signal_truth.asymmetry(p),
        "selfattn": {"attn_diag_logmean": np.log(own).mean(), "eigval_9": np.sort(own)[-10]},
        "laplacian": {f"eigval_{i}": value for i, value in enumerate(np.sort(received - own)[::-1][:10])},
        "routing": signal_truth.routing(p),
        "tracker": signal_truth.tracker(p),
        "cyclic": signal_truth.cyclic(scores),
        "magnetic": signal_truth.magnetic(scores / 8),
        "lookback": {"mean": np.mean(answer), "mean_answer": np.mean(answer), "lowest": lowest(answer)},
        "focus": {"mass_instruction": last[:9].sum(), "mass": last[:9].sum()},
        "heavy_hitters": {"received_0": received[order[0]], "top10_share": received[order].sum() / received.sum()},
    }


def lookback(p: np.ndarray, prompt_len: int) -> float:
    context, generated = p[:prompt_len].mean(), p[prompt_len:].mean()
    return float(context / (context + generated))


def lowest(ratios: list[float]) -> float:
    return float(min(np.mean(ratios[i : i + 8]) for i in range(len(ratios) - 7)))


def assert_rauq(values: SignalValues, truth: WholeTruth, attention: np.ndarray, trace: RequestTrace) -> None:
    """Token by token, at the head with the most attention to the token before."""
    first, last = trace.prompt_len, attention.shape[-1]
    logprobs = truth.logprobs[first - 1 : last - 1]
    scores = []
    for layer in trace.layers:
        previous = np.array(
            [[attention[layer, head, t, t - 1] for head in trace.heads] for t in range(first + 1, last)]
        )
        c = [np.exp(logprobs[0])]
        for logprob, a in zip(logprobs[1:], previous[:, previous.mean(axis=0).argmax()], strict=True):
            c.append(0.2 * np.exp(logprob) + 0.8 * a * c[-1])
        scores.append(-np.mean(np.log(c)))
    np.testing.assert_allclose(np.nanmax(values.by_place["layer_score"], axis=1), scores, rtol=5 * RELATIVE)
    assert values.of_request == {"score": pytest.approx(max(scores), rel=5 * RELATIVE), "tokens": last - first}
