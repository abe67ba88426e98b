"""Traces on a GPU with CUDA graphs: whose each row is, and what it holds, against transformers' eager attention."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.core.statistics import INDEX
from glassbox.store.trace_record import RequestTrace
from tests.integration.gpu_engine import (
    PREFILL_ROWS,
    TracedResult,
    measured_positions,
    run_engines,
    traced_spec,
)

pytestmark = [pytest.mark.gpu, pytest.mark.integration]

CONFIG: dict[str, Any] = {
    "sample_rate": 0.25,
    "sampling": {"max_rows_per_step": 256, "prefill_rows_per_request": PREFILL_ROWS},
    "requests": {"include_text": True, "max_trace_mb": 256, "max_active_mb": 4096, "keep_mb": 4096},
    "export": {"interval_s": 0.2},
}
TRACE: dict[str, Any] = {"glassbox": "trace"}
EVERYTHING = {
    **TRACE,
    "glassbox_top_k": 5,
    "glassbox_spans": ["head=0:4", "middle=4:30", "answer=9:400"],
    "glassbox_rows": 1,
}
CHOSEN = {**TRACE, "glassbox_layers": [3, 0, 29], "glassbox_heads": [8, 1], "glassbox_top_k": 3}
KINDS: list[dict[str, Any] | None] = [EVERYTHING, None, TRACE, {"glassbox": "off"}, CHOSEN]
LENGTHS = [3, 17, 250, 64, 128, 31, 5, 77, 200, 12, 90, 40]


class Traced(TracedResult):
    """What one engine left behind of traced requests."""

    def of(self, kind: dict[str, Any]) -> list[tuple[RequestTrace, list[int]]]:
        """Traces of the requests that asked for `kind`, each with all tokens of the request."""
        return [(found[0], tokens) for extra, found, tokens in self.asked() if extra == kind]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traced]:
    """Both runners, with a KV cache for a few of the requests and a small chunk size."""
    folder = tmp_path_factory.mktemp("gpu-traces")
    base = traced_spec(LENGTHS, KINDS, CONFIG)
    variants = {
        "v2": base,
        "v1": replace(base, v2_runner=False),
        "triton": replace(base, backend="TRITON_ATTN"),
        "plain": replace(base, config=None),
    }
    specs = {name: replace(spec, out=str(folder / name)) for name, spec in variants.items()}
    run_engines(specs, folder)
    return {name: Traced(spec) for name, spec in specs.items()}


OBSERVED = ("v2", "v1", "triton")


@pytest.mark.parametrize("name", OBSERVED)
class TestIdentity:
    def test_every_request_that_asked_has_its_rows(self, engines: dict[str, Traced], name: str) -> None:
        """Also when it was preempted: all decode positions once, and the fixed choice of prompt positions."""
        engine = engines[name]
        assert engine.report["preemptions"] > 0, "the cache must be too small for this test to mean anything"
        assert engine.report["errors"] == {}
        assert engine.spec.extra_args is not None
        for extra, found, prompt, answer in zip(
            engine.spec.extra_args, engine.traces, engine.spec.prompts, engine.report["tokens"], strict=True
        ):
            if (extra or {}).get("glassbox") != "trace":
                assert found == []
                continue
            (trace,) = found
            assert (trace.status, trace.why, trace.truncated) == ("finished", "opt_in", False)
            assert (trace.prompt_len, trace.num_generated) == (len(prompt), len(answer))
            prefill, decode = measured_positions(len(prompt), len(prompt) + len(answer))
            assert trace.positions.tolist() == prefill + decode

    def test_tokens(self, engines: dict[str, Traced], name: str) -> None:
        """They are kept on the device by the V2 runner, and come with the end of the request."""
        for kind in (EVERYTHING, TRACE, CHOSEN):
            for trace, tokens in engines[name].of(kind):
                if name == "v1" and not trace.token_ids.size:
                    continue  # the V1 runner may not have read its last token back
                assert trace.token_ids.tolist() == tokens


class TestValues:
    """As near to float32 transformers as transformers in bfloat16 is, within a factor of two."""

    @pytest.mark.parametrize("name", OBSERVED)
    def test_everything(self, engines: dict[str, Traced], name: str) -> None:
        """Statistics, masses of spans and of the positions that are named, and whole attention vectors."""
        import torch

        from tests.integration.transformers_truth import EagerModel

        path = Path(engines[name].spec.model)
        exact = EagerModel(path, torch.float32, device="cuda")
        rounded = EagerModel(path, torch.bfloat16, device="cuda")
        ours: dict[str, list[np.ndarray]] = {}
        theirs: dict[str, list[np.ndarray]] = {}
        for kind in (EVERYTHING, CHOSEN):
            for trace, tokens in engines[name].of(kind):
                place = np.ix_(trace.layers, trace.heads)
                true, yardstick = exact.attention(tokens)[place], rounded.attention(tokens)[place]
                for t, position in enumerate(trace.positions.tolist()):
                    _add_errors(ours, _of_trace(trace, t), true[:, :, position, : position + 1], trace, t)
                    _add_errors(theirs, None, true[:, :, position, : position + 1], trace, t, yardstick[:, :, position])
        assert set(ours) == {"top1_ratio", "sink_ratio", "span_mass", "topk_mass", "mean_topk_mass", "row"}
        for what, errors in ours.items():
            mine, reference = (
                float(np.sqrt(np.mean(np.concatenate([np.square(error).ravel() for error in of]))))
                for of in (errors, theirs[what])
            )
            print(f"{name} {what}: rms error {mine:.3g}, transformers in bfloat16 {reference:.3g}")
            assert mine <= 2 * reference, what

    @pytest.mark.parametrize("name", OBSERVED)
    def test_the_parts_of_a_trace_fit_each_other(self, engines: dict[str, Traced], name: str) -> None:
        """Spans, top positions and statistics are those of the row, to float16's rounding of it."""
        for trace, _ in engines[name].of(EVERYTHING):
            for t in range(len(trace.positions)):
                row = trace.attention(t).astype(np.float64)
                np.testing.assert_allclose(row.sum(-1), 1, atol=5e-3)
                np.testing.assert_allclose(trace.stats[t, ..., INDEX["top1_ratio"]], row.max(-1), rtol=0, atol=1e-3)
                count = min(5, row.shape[-1])
                np.testing.assert_allclose(
                    trace.topk_mass[t, ..., :count], -np.sort(-row, axis=-1)[..., :count], rtol=0, atol=1e-3
                )
                for s, span in enumerate(trace.options.spans):
                    expected = row[..., span.start : span.end].sum(-1)
                    np.testing.assert_allclose(trace.span_mass[t, ..., s], expected, rtol=0, atol=5e-3)


class TestServing:
    def test_tokens_are_those_without_the_plugin(self, engines: dict[str, Traced]) -> None:
        """Greedy, token for token, whoever is traced."""
        assert engines["v2"].report["tokens"] == engines["plain"].report["tokens"]


def _of_trace(trace: RequestTrace, t: int) -> dict[str, np.ndarray]:
    """What a row of a trace says, by name."""
    found = {name: trace.stats[t, ..., INDEX[name]] for name in ("top1_ratio", "sink_ratio")}
    k = min(trace.options.top_k, int(trace.positions[t]) + 1)
    found |= {"topk_mass": trace.topk_mass[t, ..., :k], "mean_topk_mass": trace.mean_topk_mass[t, :k]}
    if trace.has_attention:
        found |= {"span_mass": trace.span_mass[t], "row": trace.attention(t)}
    return found


def _add_errors(
    errors: dict[str, list[np.ndarray]],
    found: dict[str, np.ndarray] | None,
    true: np.ndarray,  # [L, H, keys], attention of the row
    trace: RequestTrace,
    t: int,
    yardstick: np.ndarray | None = None,
) -> None:
    """Differences from the truth at the positions that the trace names; of `yardstick` [L, H, T] without `found`."""
    k = min(trace.options.top_k, true.shape[-1])
    keys, mean_keys = trace.topk_positions[t, ..., :k], trace.mean_topk_positions[t, :k]

    def reduce(p: np.ndarray) -> dict[str, np.ndarray]:
        reduced = {
            "top1_ratio": p.max(-1),
            "sink_ratio": p[..., :4].sum(-1),
            "topk_mass": np.take_along_axis(p, keys, -1),
            "mean_topk_mass": p.mean(axis=(0, 1))[mean_keys],
        }
        if trace.has_attention:
            spans = [p[..., span.start : span.end].sum(-1) for span in trace.options.spans]
            reduced |= {"span_mass": np.stack(spans, -1), "row": p}
        return reduced

    if found is None:
        assert yardstick is not None
        found = reduce(yardstick[..., : true.shape[-1]].astype(np.float64))
    for name, expected in reduce(true.astype(np.float64)).items():
        errors.setdefault(name, []).append(found[name].astype(np.float64) - expected)
