"""Statistics of a real model in vLLM equal those of transformers' eager attention, row by row."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassbox.config.load import load_config
from glassbox.core.statistics import INDEX, NUM_STATISTICS, STATISTICS
from tests.attached import plugin, running_observer
from tests.integration.row_recorder import MeasuredRow, RowRecorder
from tests.integration.transformers_truth import EagerModel, SequenceTruth
from tests.serving import wait_for

pytestmark = pytest.mark.integration

SINK_TOKENS, LOCAL_WINDOW, PREFILL_ROWS = 4, 128, 8
CHUNK = 96  # max_num_batched_tokens: prompts longer than this are prefilled in chunks
TURN = 7  # layers of a step, where they take turns: no divisor of how many there are
# Both sides compute in float32 with their own order of summation.
ENTROPY_NATS, MASS, RELATIVE = 1e-3, 1e-4, 1e-3


@dataclass
class Served:
    """One prompt after serving: its tokens, and which measured rows are its own."""

    tokens: list[int]
    prompt_len: int
    rows: list[MeasuredRow] = field(default_factory=list)


class Engine:
    """An in-process vLLM with the plugin at sample_rate 1, and a recorder of its rows."""

    def __init__(self, model: Path, dtype: str, **options: Any) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(model),
            dtype=dtype,
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=8,
            enable_prefix_caching=True,
            seed=0,
            **options,
        )
        self.recorder = RowRecorder()

    def serve(self, prompts: list[list[int]], max_tokens: list[int]) -> list[Served]:
        """Serve all prompts at once; rows are matched to them by request."""
        from vllm import SamplingParams

        self.recorder.take()
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in max_tokens],
            use_tqdm=False,
        )
        served = {
            output.request_id: Served([*prompt, *output.outputs[0].token_ids], len(prompt))
            for prompt, output in zip(prompts, outputs, strict=True)
        }
        for row in self.recorder.take():
            # vLLM's internal id is `external-<8 characters>`.
            external = row.request_id if row.request_id in served else row.request_id.rpartition("-")[0]
            served[external].rows.append(row)
        return list(served.values())


@pytest.fixture(scope="module")
def prompts(demo_model_path: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path)
    text = (
        "The attention of a language model decides which earlier words each new word is made from. "
        "Operators of a server seldom see it, although a broken template or a wrong rotary base shows there first. "
    )
    long = tokenizer.encode(text * 8)
    return [
        tokenizer.encode("The capital of France is"),
        tokenizer.encode("def fibonacci(n):\n    "),
        long[:250],
        tokenizer.encode("Once upon a time there was a small robot who"),
        long[40:150],
    ]


@pytest.fixture(scope="module", autouse=True)
def plugin_environment(config_file: Path) -> Iterator[None]:
    config = (
        "sample_rate: 1.0\n"
        f"sampling: {{max_rows_per_step: 4096, prefill_rows_per_request: {PREFILL_ROWS}}}\n"
        f"statistics: {{sink_tokens: {SINK_TOKENS}, local_window: {LOCAL_WINDOW}}}\n"
    )
    with plugin(config_file.parent, config):
        yield


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("glassbox") / "glassbox.yaml"


@contextmanager
def edited(config_file: Path, text: str) -> Iterator[None]:
    """The file says this meanwhile, and the observer follows it, there and back."""
    before = config_file.read_text()
    follow(config_file, text)
    try:
        yield
    finally:
        follow(config_file, before)


def follow(config_file: Path, text: str) -> None:
    config_file.write_text(text)
    wanted, observer = load_config(config_file), running_observer()
    wait_for(observer._read_config, lambda config: config == wanted, 60, "the edit")


@pytest.fixture(scope="module")
def engine(demo_model_path: Path, plugin_environment: None) -> Engine:
    return Engine(demo_model_path, "float32")


@pytest.fixture(scope="module")
def eager(demo_model_path: Path) -> EagerModel:
    return EagerModel(demo_model_path, torch.float32)


def truth_of(model: EagerModel, served: Served) -> SequenceTruth:
    return model.truth(served.tokens, served.prompt_len, SINK_TOKENS, LOCAL_WINDOW)


def assert_rows_equal(served: Served, truth: SequenceTruth) -> None:
    """Every statistic of every measured row, all heads in all layers that were measured."""
    assert served.rows
    for row in served.rows:
        expected = {name: values[list(row.layers)][..., row.position] for name, values in truth.values.items()}
        measured = {name: row.stats[..., INDEX[name]] for name in INDEX}
        assert not row.stats[..., NUM_STATISTICS].any(), "no score of a healthy model is NaN or Inf"
        assert row.phase == (row.position >= served.prompt_len)
        log_n = np.log(row.position + 1)
        where = f"position {row.position} of {served.prompt_len}"
        np.testing.assert_allclose(
            measured["entropy_ratio"] * log_n,
            expected["entropy"] if log_n else 0,
            rtol=0,
            atol=ENTROPY_NATS,
            err_msg=where,
        )
        for name in ("top1_ratio", "sink_ratio", "local_ratio"):
            np.testing.assert_allclose(measured[name], expected[name], rtol=0, atol=MASS, err_msg=f"{name}, {where}")
        for name in ("max_logit", "effective_keys", "distance_tokens", "self_logprob"):
            np.testing.assert_allclose(
                measured[name], expected[name], rtol=RELATIVE, atol=RELATIVE, err_msg=f"{name}, {where}"
            )
        if row.phase:
            np.testing.assert_allclose(
                measured["lookback_ratio"], expected["lookback_ratio"], rtol=0, atol=1e-3, err_msg=where
            )
        else:
            assert np.isnan(measured["lookback_ratio"]).all(), "a prompt row has no lookback ratio"


def expected_prefill_positions(prompt_len: int) -> list[int]:
    if prompt_len <= PREFILL_ROWS:
        return list(range(prompt_len))
    return [-(-(k + 1) * prompt_len // PREFILL_ROWS) - 1 for k in range(PREFILL_ROWS)]


class TestFloat32:
    """vLLM and transformers both in float32."""

    def test_mixed_batch_of_short_and_chunked_prompts(
        self, engine: Engine, eager: EagerModel, prompts: list[list[int]]
    ) -> None:
        """Prefill, chunked prefill and decode of five requests that run side by side."""
        served = engine.serve(prompts, [12, 5, 8, 16, 10])
        for one in served:
            positions = sorted(row.position for row in one.rows)
            # The last sampled token is never fed back, so it has no row.
            expected = expected_prefill_positions(one.prompt_len) + list(range(one.prompt_len, len(one.tokens) - 1))
            assert positions == expected
            assert_rows_equal(one, truth_of(eager, one))

    def test_prefix_cache_hit(self, engine: Engine, eager: EagerModel, prompts: list[list[int]]) -> None:
        """Keys that an earlier request computed are read like the request's own."""
        prompt = prompts[2]
        engine.serve([prompt], [1])
        (served,) = engine.serve([prompt + prompts[0]], [6])
        positions = [row.position for row in served.rows if not row.phase]
        full = expected_prefill_positions(len(prompt) + len(prompts[0]))
        assert positions
        assert len(positions) < len(full), "rows of the cached prefix are not computed, so not measured"
        assert_rows_equal(served, truth_of(eager, served))

    def test_single_token_prompt(self, engine: Engine, eager: EagerModel, prompts: list[list[int]]) -> None:
        """A row with one key: entropy ratio 0, one effective key, all mass on itself."""
        (served,) = engine.serve([prompts[0][:1]], [3])
        first = next(row for row in served.rows if row.position == 0)
        assert (first.stats[..., INDEX["entropy_ratio"]] == 0).all()
        assert (first.stats[..., INDEX["effective_keys"]] == 1).all()
        assert (first.stats[..., INDEX["top1_ratio"]] == 1).all()
        assert_rows_equal(served, truth_of(eager, served))

    def test_accumulators_hold_exactly_the_measured_rows(self, engine: Engine, prompts: list[list[int]]) -> None:
        """Row counts, bucket counts and sums are those of the rows, counted by hand."""
        observer = running_observer()
        before = observer.measurer.copy(0.0)
        served = engine.serve(prompts[:3], [4, 6, 8])
        after = observer.measurer.copy(0.0)
        rows = [row for one in served for row in one.rows]
        phases = Counter(row.phase for row in rows)
        assert (after.rows - before.rows == [phases[0], phases[1]]).all()
        for statistic in STATISTICS:
            column = INDEX[statistic.name]
            for phase in (0, 1):
                values = np.stack([row.stats[..., column] for row in rows if row.phase == phase])
                if statistic.decode_only and phase == 0:
                    assert (after.counts - before.counts)[:, :, phase, column].sum() == 0
                    continue
                edges = np.array([-np.inf, *statistic.buckets, np.inf], dtype=np.float32)
                expected = np.stack(
                    [((values > low) & (values <= high)).sum(0) for low, high in itertools.pairwise(edges)],
                    -1,
                )
                np.testing.assert_array_equal((after.counts - before.counts)[:, :, phase, column], expected)
                np.testing.assert_allclose(
                    (after.sums - before.sums)[:, :, phase, column],
                    values.astype(np.float64).sum(0),
                    rtol=1e-9,
                    atol=1e-9,
                )

    def test_layers_in_turn(
        self, engine: Engine, eager: EagerModel, prompts: list[list[int]], config_file: Path
    ) -> None:
        """An edit while it serves: a step measures some layers, each in as many steps, as exactly as before."""
        observer, before = running_observer(), config_file.read_text()
        num_layers = observer.measurer.copy(0.0).rows.shape[0]
        with edited(config_file, before.replace("sampling: {", f"sampling: {{layers_per_step: {TURN}, ")):
            assert TURN / num_layers == observer.effective_sample_rate, "every step is measured, which is not enough"
            engine.recorder.turns.clear()
            served = engine.serve(prompts, [12, 5, 8, 16, 10])
            for one in served:
                assert_rows_equal(one, truth_of(eager, one))
            turns = engine.recorder.turns
            assert {TURN} == {len(layers) for layers in turns}
            times = Counter(layer for layers in turns for layer in layers)
            assert num_layers == len(times)
            assert max(times.values()) - min(times.values()) <= 1
        assert 1 == observer.effective_sample_rate


class TestBfloat16:
    """vLLM in bfloat16: as near to float32 transformers as transformers in bfloat16 is, within a factor of two."""

    def test_errors_are_those_of_the_dtype(
        self, demo_model_path: Path, eager: EagerModel, prompts: list[list[int]]
    ) -> None:
        """Root mean square over all rows, layers and heads, per statistic."""
        engine = Engine(demo_model_path, "bfloat16")
        same_dtype = EagerModel(demo_model_path, torch.bfloat16)
        served = engine.serve(prompts, [12, 5, 8, 16, 10])
        errors: dict[str, list[np.ndarray]] = {name: [] for name in INDEX}
        yardstick: dict[str, list[np.ndarray]] = {name: [] for name in INDEX}
        for one in served:
            exact, rounded = truth_of(eager, one), truth_of(same_dtype, one)
            for row in one.rows:
                for name in INDEX:
                    if name == "lookback_ratio" and not row.phase:
                        continue
                    right = exact.values[name][..., row.position]
                    errors[name].append(row.stats[..., INDEX[name]] - right)
                    yardstick[name].append(rounded.values[name][..., row.position] - right)
        for name in INDEX:
            ours = float(np.sqrt(np.mean(np.square(errors[name]))))
            theirs = float(np.sqrt(np.mean(np.square(yardstick[name]))))
            assert ours <= 2 * theirs, f"{name}: {ours:.3g} against {theirs:.3g} of transformers in bfloat16"
