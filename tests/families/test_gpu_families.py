"""Families on a GPU: windows, chunks, learned sinks and hybrids by the kernels for GPUs, on vLLM's V2 model runner.

    pytest -m gpu tests/families

The truth is float64 from vLLM's own q and k: what runs before attention rounds otherwise there than in transformers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from glassbox.adapter.seat import SEAT
from glassbox.core.output_checks import LayerState
from glassbox.core.statistics import STATISTICS
from glassbox.store.snapshot import Snapshot
from tests.attached import plugin
from tests.families.family import Family
from tests.families.models import make_checkpoint
from tests.families.serving import (
    CONFIG,
    LOCAL_WINDOW,
    SINK_TOKENS,
    CannotServeError,
    Served,
    answer,
    engine,
    serve_plain,
)
from tests.families.softmax_truth import statistics_of
from tests.families.table import FAMILIES
from tests.integration.gpu_engine import measured_positions

pytestmark = [pytest.mark.gpu, pytest.mark.integration, pytest.mark.families]

NAMES: Final = (
    "Llama", "Gemma 3", "gpt-oss", "Llama 4",
    "Granite hybrid", "Falcon-H1", "Nemotron-H", "LFM2", "Qwen3-Next", "Jamba",
)  # fmt: skip
_ENGINE: Final[dict[str, Any]] = {
    "attention_backend": "TRITON_ATTN",
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 28,
}
# Of means over rows: float32 sums of some hundred rows.
_CLOSE: Final = 1e-4


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.name in NAMES], ids=lambda f: f.name)
def test_family(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens as without glassbox; means of every statistic of each layer and head; every layer certified."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    checkpoint = tmp_path / "model"
    make_checkpoint(family, checkpoint)
    settings = {**family.serving, **_ENGINE}
    try:
        plain = serve_plain(checkpoint, together=False, **settings)
    except CannotServeError as refused:
        pytest.skip(f"vLLM doesn't serve it here: {refused}")
    served, snapshot, runner = _serve_observed(checkpoint, tmp_path, settings)
    assert [one.tokens for one in served] == [one.tokens for one in plain]
    assert runner == "vllm.v1.worker.gpu.model_runner"
    assert {stage: count for stage, count in snapshot.numbers["errors"].items() if count} == {}
    assert list(snapshot.layers) == family.observed
    assert set(snapshot.checks.state.tolist()) == {LayerState.CERTIFIED}
    places = [family.layers.index(layer) for layer in family.observed]
    rows, sums = _expected(served, places)
    np.testing.assert_array_equal(snapshot.rows, np.broadcast_to(rows, snapshot.rows.shape))
    count = rows[None, None, :, None]
    deviation = np.abs(snapshot.sums - sums) / count / np.maximum(1, np.abs(sums) / count)
    print(family.name, f"{deviation.max():.2g}")
    assert deviation.max() <= _CLOSE


def _serve_observed(model: Path, folder: Path, settings: dict[str, Any]) -> tuple[list[Served], Snapshot, str]:
    with plugin(folder, CONFIG), engine(model, settings) as llm:
        served = list(answer(llm, together=False, with_scores=True).values())
        worker = SEAT.hook.worker  # type: ignore[union-attr]
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        return served, worker.snapshot(), type(runner).__module__


def _expected(served: Sequence[Served], places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows, [2] by phase, and sums of the statistics, [L, H, 2, S]."""
    rows, total = np.zeros(2), None
    for one in served:
        positions = measured_positions(one.prompt_len, len(one.tokens))
        rows += [len(of_phase) for of_phase in positions]
        for place, layer in enumerate(places):
            values = statistics_of(one.scores[layer], one.prompt_len, SINK_TOKENS, LOCAL_WINDOW)
            if total is None:
                total = np.zeros((len(places), len(values["max_logit"]), 2, len(STATISTICS)))
            for number, statistic in enumerate(STATISTICS):
                for phase in range(statistic.decode_only, 2):
                    total[place, :, phase, number] += values[statistic.name][:, positions[phase]].sum(-1)
    assert total is not None
    return rows, total
