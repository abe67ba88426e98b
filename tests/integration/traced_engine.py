"""An in-process vLLM with the plugin, whose preemptions are counted and whose traces are waited for."""

import time
from pathlib import Path
from typing import Any, Final

import pytest

from glassbox.adapter.offline_engine import deliver_ends
from glassbox.store import rundir
from glassbox.store.trace_directory import TraceDirectory
from glassbox.store.trace_record import RequestTrace
from tests.attached import running_observer

BLOCK: Final = 32
_DELIVERED_S: Final = 120.0


class TracedEngine:
    """A model in float32 on the CPU, with prefix caching; only one in a process.

    Args:
        model: folder.
        patch: counts preemptions for as long as it lasts.
        chunk: tokens of a step, so of a chunk of a prompt.
        blocks: of BLOCK tokens in the KV cache: fewer than the requests need lets them be preempted.
        max_model_len: tokens.
    """

    def __init__(self, model: Path, patch: pytest.MonkeyPatch, *, chunk: int, blocks: int, max_model_len: int) -> None:
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
            max_model_len=max_model_len,
            block_size=BLOCK,
            num_gpu_blocks_override=blocks,
            max_num_batched_tokens=chunk,
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

    def traces(self, outputs: list[Any]) -> dict[str, list[RequestTrace]]:
        """Of ended requests, by external id, once all of them lie in the run directory."""
        directory = TraceDirectory(rundir.run_dir())
        ids = {output.request_id for output in outputs}
        deadline = time.monotonic() + _DELIVERED_S
        while time.monotonic() < deadline:
            summaries = [s for s in directory.summaries() if s.request_id in ids]
            if not any(s.status == "active" for s in summaries) and not self.tracker.ended():
                break
            time.sleep(0.05)
        return {output.request_id: directory.traces(output.request_id) for output in outputs}

    @property
    def tracker(self) -> Any:
        """Of the worker's traced requests."""
        return running_observer().requests
