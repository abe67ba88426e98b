"""An in-process vLLM of which every step is measured and checked, and what came of that."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from glassbox.core.errors import ErrorCounter
from glassbox.core.output_checks import LayerState
from glassbox.processes.worker.canary import Canary
from glassbox.processes.worker.worker import Worker
from tests.attached import attached_hook
from tests.export_samples import logged

# SmolLM2-135M.
LAYERS, HEADS = 30, 9
CHUNK: Final = 64  # max_num_batched_tokens: longer prompts are prefilled in chunks
# Too few for eight requests of some hundred tokens, so that some of them are preempted.
BLOCKS, BLOCK = 26, 32


class LeapingClock:
    """Every step is a day later, so that each is checked."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 86_400.0
        return self.now_s


@dataclass(frozen=True)
class Found:
    """What came of one run with a canary of its own.

    Attributes:
        tokens: that were served.
        said: log lines of errors.
        counts: rows, by result.
        failed: layers.
        rows: that each layer measured in the run, and in a second one after it.
        bypassed: layers by reason.
        errors: of glassbox, by stage.
    """

    tokens: list[list[int]]
    said: list[str]
    counts: dict[str, int]
    failed: list[int]
    rows: tuple[np.ndarray, np.ndarray]
    bypassed: dict[str, int]
    errors: dict[str, int]


class CheckedEngine:
    """An in-process vLLM of which every step is measured, and its checks: each of them with a canary of its own."""

    def __init__(
        self, model: Path, dtype: str, *, layers: int = LAYERS, max_model_len: int = 512, **options: Any
    ) -> None:
        from vllm import LLM

        self.layers = layers
        self.llm = LLM(
            str(model),
            dtype=dtype,
            enforce_eager=True,
            max_model_len=max_model_len,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=8,
            enable_prefix_caching=True,
            block_size=BLOCK,
            num_gpu_blocks_override=BLOCKS,
            gpu_memory_utilization=0.3,
            seed=0,
            **options,
        )
        worker = attached_hook().worker
        assert worker is not None
        self.worker: Worker = worker

    def attention(self, layer: int) -> Any:
        return self.decoder(layer).self_attn.attn

    def decoder(self, layer: int) -> Any:
        vllm_worker: Any = self.worker.vllm_worker()
        return vllm_worker.model_runner.get_model().model.layers[layer]

    def serve(self, prompts: list[list[int]], max_tokens: int, *, keep_prefixes: bool = False) -> list[list[int]]:
        """All at once; the generated tokens."""
        from vllm import SamplingParams

        if not keep_prefixes:
            self.llm.reset_prefix_cache()
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        self.worker.observer.disarm()
        try:
            yield
        finally:
            self.worker.observer.armed = True

    def renew(self, *, probation: bool) -> None:
        """A canary and a counter of errors that know of nothing, and new views: as in a new worker."""
        canary = Canary(
            self.worker._place,
            self.worker.observer.measurer.check_limits,
            probation=probation,
            decode_only=self.worker._facts.layers.latent,
            count=self.worker._count_checked,
            clock=LeapingClock(),
        )
        observer = self.worker.observer
        self.worker._canary = observer._canary = canary
        errors = ErrorCounter(logging.getLogger("glassbox.tests"))
        self.worker._errors = observer._errors = observer.measurer._errors = errors
        for layer in range(self.layers):
            self.attention(layer).impl.glassbox_view = None
            self.worker.observer.measurer._cached_layers.pop(layer, None)

    def rows(self) -> np.ndarray:
        """[L] measured so far, of one head."""
        rows: np.ndarray = self.worker.observer.measurer.copy(0.0).rows
        return rows[:, 0].sum(-1)

    def watch(
        self, serve: Callable[[], list[list[int]]], caplog: pytest.LogCaptureFixture, *, probation: bool = False
    ) -> Found:
        """What is found while something is served, with a new canary; and whether it is measured after that."""
        self.renew(probation=probation)
        observer = self.worker.observer
        counts, rows = dict(observer.counters.canary_rows), [self.rows()]
        caplog.clear()
        tokens = serve()
        rows.append(self.rows())
        self.worker._canary._clock = lambda: 0.0  # no check takes the next step's sample away
        self.serve([[1, 2, 3]], 2)
        rows.append(self.rows())
        numbers = self.worker._numbers()
        return Found(
            tokens,
            logged([record for record in caplog.records if record.levelno >= logging.WARNING]),
            {name: n - counts.get(name, 0) for name, n in observer.counters.canary_rows.items()},
            np.flatnonzero(self.worker._canary.checks().state == LayerState.FAILED).tolist(),
            (rows[1] - rows[0], rows[2] - rows[1]),
            dict(numbers["layers_bypassed"]),
            dict(numbers["errors"]),
        )
