"""Whole prompts on a GPU with CUDA graphs equal transformers' eager attention, as nearly as it does itself in bfloat16.

The engines have a KV cache for a few of the requests and a small chunk size, so prompts are chunked and mixed with
decode tokens, and requests are preempted and resumed.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.core.statistics import INDEX
from glassbox.store.trace_record import RequestTrace
from tests.integration.gpu_engine import TracedResult, run_engines, traced_spec

pytestmark = [pytest.mark.gpu, pytest.mark.integration]

CONFIG: dict[str, Any] = {
    "sample_rate": 0.25,
    "requests": {"include_text": True, "max_trace_mb": 256, "max_active_mb": 4096, "keep_mb": 4096},
    "export": {"interval_s": 0.2},
}
TRACE: dict[str, Any] = {"glassbox": "trace"}
WHOLE: dict[str, Any] = {**TRACE, "glassbox_prompt": "all", "glassbox_spans": ["head=0:4", "middle=4:30"]}
SIGNALS: dict[str, Any] = {**WHOLE, "glassbox_signals": ["spectral", "laplacian", "rauq"]}
KEPT: dict[str, Any] = {
    **WHOLE, "glassbox_signals": ["routing"], "glassbox_layers": [0, 29], "glassbox_heads": [1, 4, 8]
}  # fmt: skip
ROWS: dict[str, Any] = {**WHOLE, "glassbox_top_k": 3, "glassbox_rows": 1}
KINDS: list[dict[str, Any] | None] = [SIGNALS, None, KEPT, TRACE, ROWS]
# 65 and 129 have a last chunk of one token, which may come alone with decode tokens: vLLM replays a whole graph then.
LENGTHS = [65, 17, 250, 64, 128, 129, 5, 77, 200, 12, 193, 40, 1, 90, 31]
OBSERVED = ("v2", "v1", "triton", "eager")


class Traced(TracedResult):
    """What one engine left behind of traced requests."""

    def whole(self) -> Iterator[tuple[RequestTrace, list[int]]]:
        """Traces of whole prompts, each with all tokens of the request."""
        for extra, found, tokens in self.asked():
            if "glassbox_prompt" in extra:
                (trace,) = found
                yield trace, tokens


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traced]:
    """Both runners, two backends, with CUDA graphs and without."""
    folder = tmp_path_factory.mktemp("gpu-prompts")
    base = traced_spec(LENGTHS, KINDS, CONFIG)
    variants = {
        "v2": base,
        "v1": replace(base, v2_runner=False),
        "triton": replace(base, backend="TRITON_ATTN"),
        "eager": replace(base, eager=True),
        "plain": replace(base, config=None),
    }
    specs = {name: replace(spec, out=str(folder / name)) for name, spec in variants.items()}
    run_engines(specs, folder)
    return {name: Traced(spec) for name, spec in specs.items()}


@pytest.mark.parametrize("name", OBSERVED)
class TestRows:
    def test_every_row_of_the_prompt_is_there(self, engines: dict[str, Traced], name: str) -> None:
        """Once, whatever the chunks were, also when the request was preempted; and nothing was counted as missing."""
        engine = engines[name]
        assert engine.report["preemptions"] > 0, "the cache must be too small for this test to mean anything"
        assert engine.report["errors"] == {}
        for trace, tokens in engine.whole():
            assert (trace.notes, trace.truncated, trace.status) == ((), False, "finished")
            assert trace.positions.tolist() == list(range(len(tokens) - 1))
            finite = np.isfinite(trace.stats[..., : INDEX["lookback_ratio"]])
            assert finite.all(), f"{trace.request_id}: {np.argwhere(~finite.all((1, 2, 3))).ravel().tolist()}"

    def test_what_is_known_without_a_truth(self, engines: dict[str, Traced], name: str) -> None:
        """Each row gives 1 in all; the first one gives it to itself; spans and sums fit the statistics."""
        for trace, tokens in engines[name].whole():
            rows = len(tokens) - 1
            np.testing.assert_allclose(trace.received.sum(-1), rows, rtol=1e-5)
            assert np.isnan(trace.previous_mass[0]).all()
            assert np.isfinite(trace.previous_mass[1:]).all()
            np.testing.assert_allclose(trace.stats[0, ..., INDEX["self_logprob"]], 0, atol=1e-6)
            np.testing.assert_allclose(
                trace.span_mass[..., 0], trace.stats[..., INDEX["sink_ratio"]], rtol=0, atol=1e-5,
                err_msg="span head=0:4 is the attention sink's",
            )  # fmt: skip
            of_first_four = trace.span_mass[..., 0].astype(np.float64).sum(0)
            np.testing.assert_allclose(of_first_four, trace.received[..., :4].sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OBSERVED)
def test_values(engines: dict[str, Traced], name: str) -> None:
    """As near to float32 transformers as transformers in bfloat16 is, within a factor of two."""
    import torch

    from tests.integration.transformers_truth import EagerModel, whole_truth

    path = Path(engines[name].spec.model)
    exact, rounded = (EagerModel(path, dtype, device="cuda") for dtype in (torch.float32, torch.bfloat16))
    ours: dict[str, list[np.ndarray]] = {}
    theirs: dict[str, list[np.ndarray]] = {}
    for trace, tokens in engines[name].whole():
        place = np.ix_(trace.layers, trace.heads)
        true, yardstick = whole_truth(exact, tokens), whole_truth(rounded, tokens)
        scale = _singular_values(true, trace)[..., :1]
        of_truth, of_yardstick = (_arrays(one, trace, place, scale) for one in (true, yardstick))
        for what, expected in of_truth.items():
            theirs.setdefault(what, []).append(of_yardstick[what] - expected)
        found: dict[str, np.ndarray] = {
            "previous_mass": np.moveaxis(trace.previous_mass, 0, 2)[..., 1:],
            "self_mass": np.moveaxis(np.exp(trace.stats[..., INDEX["self_logprob"]]), 0, 2),
            "received": trace.received / np.sqrt(np.arange(len(tokens) - 1, 0, -1)),
        }
        if "singular_values" in trace.options.arrays:
            found["singular_values"] = trace.singular_values[::6, ::4, :4] / scale
        if "keys" in trace.options.arrays:
            found["queries"], found["keys"] = np.moveaxis(trace.queries, 0, 2), np.moveaxis(trace.keys, 0, 2)
            assert trace.score_params[..., 0] == pytest.approx(64**-0.5)
            assert (trace.score_params[..., 1:3] == 0).all()
            assert np.isnan(trace.score_params[..., 3]).all()
        for what, values in found.items():
            ours.setdefault(what, []).append(values - of_truth[what])
    assert set(ours) == {"previous_mass", "self_mass", "received", "singular_values", "queries", "keys"}
    for what, errors in ours.items():
        mine, reference = (
            float(np.sqrt(np.mean(np.concatenate([np.square(error.astype(np.float64)).ravel() for error in of]))))
            for of in (errors, theirs[what])
        )
        print(f"{name} {what}: rms error {mine:.3g}, transformers in bfloat16 {reference:.3g}")
        assert mine <= 2 * reference, what


def test_tokens_are_those_without_the_plugin(engines: dict[str, Traced]) -> None:
    """Greedy, token for token, of traced requests and of those beside them."""
    assert engines["v2"].report["tokens"] == engines["plain"].report["tokens"]


def _singular_values(truth: Any, trace: RequestTrace) -> np.ndarray:
    """The four largest, falling, of some layers and heads of the trace, [layers, heads, 4]."""
    return np.array(
        [[truth.singular_values(layer, head)[:4] for head in trace.heads[::4]] for layer in trace.layers[::6]]
    )


def _arrays(truth: Any, trace: RequestTrace, place: Any, scale: np.ndarray) -> dict[str, np.ndarray]:
    """Of the layers and heads of a trace, by name: sums over a random walk's length, singular values over `scale`."""
    rows = truth.previous.shape[2]
    arrays = {
        "previous_mass": truth.previous[place][..., 1:],
        "self_mass": np.exp(truth.self_logprob[place]),
        "received": truth.received[place] / np.sqrt(np.arange(rows, 0, -1)),
    }
    if "singular_values" in trace.options.arrays:
        arrays["singular_values"] = _singular_values(truth, trace) / scale
    if "keys" in trace.options.arrays:
        arrays |= {"queries": truth.queries[place], "keys": truth.keys[place]}
    return arrays
