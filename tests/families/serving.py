"""Tiny models served by vLLM in this process, with glassbox and without it."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from torch import Tensor

from glassbox.adapter.seat import SEAT
from glassbox.core.logs import ROOT
from glassbox.store.snapshot import Snapshot
from tests.attached import plugin, start_quickly
from tests.families.models import AUDIO, SAMPLING_RATE, VOCABULARY
from tests.families.query_truth import QueryRecorder
from tests.families.softmax_truth import Scores
from tests.integration.row_recorder import MeasuredRow, RowRecorder

SINK_TOKENS, LOCAL_WINDOW, PREFILL_ROWS = 4, 48, 8
CONFIG: Final = (
    "sample_rate: 1.0\n"
    f"sampling: {{max_rows_per_step: 4096, prefill_rows_per_request: {PREFILL_ROWS}}}\n"
    f"statistics: {{sink_tokens: {SINK_TOKENS}, local_window: {LOCAL_WINDOW}}}\n"
)
NUM_GENERATED: Final = 8
PROMPT_LENGTHS: Final = (5, 70, 180)
ENGINE: Final[Mapping[str, Any]] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    # The longest prompt is prefilled in chunks, beside rows of the others.
    "max_num_batched_tokens": 96,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 64,
    "seed": 0,
}


class CannotServeError(RuntimeError):
    """vLLM itself refuses the model, or fails; the message is its."""


@dataclass
class Served:
    """One prompt after serving.

    Attributes:
        tokens: of prompt and answer.
        vectors: float32 [T, hidden size] of a pooling model, else None.
        rows: that were measured.
        scores: of each attention layer, from vLLM's q and k, if they were recorded.
    """

    tokens: list[int]
    prompt_len: int
    vectors: Tensor | None = None
    rows: list[MeasuredRow] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)


@dataclass(frozen=True)
class Observation:
    """What glassbox says of a model.

    Attributes:
        snapshot: that is exported; None if there is no worker of glassbox.
        log: its messages.
    """

    snapshot: Snapshot | None
    log: Sequence[str]


def make_prompts() -> list[list[int]]:
    """Of the three lengths; no two begin alike, and special tokens are left out."""
    return [[3 + (7 * i + 13 * n + i * i) % (VOCABULARY - 3) for i in range(n)] for n in PROMPT_LENGTHS]


def serve_plain(model: Path, *, together: bool, **settings: Any) -> list[Served]:
    """Without glassbox: what was served.

    Raises:
        CannotServeError: vLLM refuses the model, or fails.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        with engine(model, settings) as llm:
            return list(answer(llm, together=together).values())


def serve_observed(
    model: Path, folder: Path, *, together: bool, with_scores: bool, **settings: Any
) -> tuple[list[Served], Observation]:
    """With glassbox at sample rate 1: what was served, every measured row, and what glassbox says.

    Args:
        model: its checkpoint.
        folder: for glassbox's files.
        together: all prompts at once; else one after the other.
        with_scores: record vLLM's q and k; not together.
        settings: of vLLM's engine.

    Raises:
        CannotServeError: vLLM refuses the model, or fails.
    """
    with plugin(folder, CONFIG), glassbox_log() as said, engine(model, settings) as llm:
        worker = getattr(SEAT.hook, "worker", None)
        recorder = RowRecorder() if worker is not None else None
        served = answer(llm, together=together, with_scores=with_scores)
        for row in recorder.take() if recorder is not None else []:
            # vLLM's internal id is `external-<8 characters>`.
            external = row.request_id if row.request_id in served else row.request_id.rpartition("-")[0]
            served[external].rows.append(row)
        snapshot = worker.snapshot() if worker is not None else None
    return list(served.values()), Observation(snapshot, said)


@contextmanager
def engine(model: Path, settings: Mapping[str, Any]) -> Iterator[Any]:
    """An in-process vLLM, of which nothing is left afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    with ExitStack() as stack:
        # Models without experts leave groups that those with experts can't use.
        stack.callback(cleanup_dist_env_and_memory)
        start_quickly(stack.enter_context(pytest.MonkeyPatch.context()))
        with _vllm_may_refuse():
            llm = LLM(str(model), **{**ENGINE, **settings})
        stack.callback(llm.llm_engine.engine_core.shutdown)
        yield llm


def answer(llm: Any, *, together: bool, with_scores: bool = False) -> dict[str, Served]:
    """Greedy answers, or vectors of a pooling model, by request id."""
    assert not (together and with_scores)
    prompts = make_prompts()
    queries = None
    if with_scores:
        queries = QueryRecorder(llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.get_model())
    found: dict[str, Served] = {}
    for batch in [prompts] if together else [[prompt] for prompt in prompts]:
        inputs = [{"prompt_token_ids": prompt} for prompt in batch]
        if llm.model_config.is_encoder_decoder:
            audio = {"prompt": "", "multi_modal_data": {"audio": (AUDIO, SAMPLING_RATE)}}
            inputs = [{"encoder_prompt": audio, "decoder_prompt": decoder} for decoder in inputs]
        with _vllm_may_refuse(), queries.recording() if queries is not None else nullcontext():
            answers = list(_pool(llm, inputs) if llm.runner_type == "pooling" else _generate(llm, inputs))
        for request_id, one in answers:
            found[request_id] = one
            if queries is not None:
                one.scores = queries.take()
    return found


def _generate(llm: Any, inputs: Sequence[Any]) -> Iterator[tuple[str, Served]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_GENERATED, ignore_eos=True, detokenize=False)
    for output in llm.generate(inputs, params, use_tqdm=False):
        # A decoder's prompt begins with a token that vLLM adds.
        prompt = list(output.prompt_token_ids)
        yield output.request_id, Served([*prompt, *output.outputs[0].token_ids], len(prompt))


def _pool(llm: Any, inputs: Sequence[Any]) -> Iterator[tuple[str, Served]]:
    for output in llm.encode(inputs, pooling_task="token_embed", use_tqdm=False):
        prompt = list(output.prompt_token_ids)
        yield output.request_id, Served(prompt, len(prompt), output.outputs.data.float())


@contextmanager
def _vllm_may_refuse() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        # pydantic says first how many there are.
        said = next((line for line in lines if line.startswith("Value error, ")), lines[0])
        raise CannotServeError(f"{type(error).__name__}: {said.partition(' [type=')[0]}") from error


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def glassbox_log() -> Iterator[list[str]]:
    handler, logger = _Messages(), logging.getLogger(ROOT)
    logger.addHandler(handler)
    try:
        yield handler.said
    finally:
        logger.removeHandler(handler)
