"""Program of the tests: speculative decoding in process, its measured rows against transformers, as JSON.

    python tests/e2e/speculative_run.py MODEL {ngram|draft_model}

The draft model is the model itself, so that its layers would be taken for the model's if they were not told apart.

A step computes the newest token and the drafted ones, of which it then keeps some. The first request is counted: the
newest tokens alone. The second one is traced: all tokens that were kept, drafts or not, and what they add up to.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from glassbox.adapter.offline_engine import deliver_ends
from glassbox.core.statistics import INDEX
from glassbox.store import rundir
from glassbox.store.trace_directory import TraceDirectory
from glassbox.store.trace_record import RequestTrace
from tests.integration.row_recorder import RowRecorder
from tests.integration.transformers_truth import EagerModel, whole_truth

DRAFT_TOKENS: Final = 3
NUM_TOKENS: Final = 40
LOOKUP: Final = {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
SINK_TOKENS, LOCAL_WINDOW = 4, 128
OPTIONS: Final = {"glassbox": "trace", "glassbox_prompt": "all", "glassbox_signals": ["spectral", "rauq"]}


def main(model: str, method: str) -> None:
    """Serve one request and compare."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from tests.attached import running_observer

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        seed=0,
        speculative_config={
            "num_speculative_tokens": DRAFT_TOKENS,
            **({"method": "ngram", **LOOKUP} if method == "ngram" else {"method": method, "model": model}),
        },
    )
    recorder = RowRecorder()
    counters = running_observer().counters
    prompt = AutoTokenizer.from_pretrained(model).encode("one two three four five one two three four five one two")
    eager = EagerModel(Path(model), torch.float32)

    def serve(extra_args: dict[str, Any] | None) -> tuple[str, list[int]]:
        (output,) = llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, extra_args=extra_args),
            use_tqdm=False,
        )
        return output.request_id, [*prompt, *output.outputs[0].token_ids]

    def errors_of(tokens: list[int], stats: dict[int, np.ndarray]) -> dict[str, float]:
        """Largest deviation of each statistic; `stats` of each position [L, H, NUM_STATISTICS + 1]."""
        truth = eager.truth(tokens, len(prompt), SINK_TOKENS, LOCAL_WINDOW)
        errors = dict.fromkeys(("sink_ratio", "local_ratio", "top1_ratio", "entropy_ratio"), 0.0)
        for position, values in stats.items():
            for name in errors:
                difference = values[..., INDEX[name]] - truth.values[name][..., position]
                if name == "entropy_ratio":
                    difference = difference * np.log(position + 1)  # in nats, as the tolerance is
                errors[name] = max(errors[name], float(np.abs(difference).max()))
        return errors

    _, tokens = serve(None)
    rows, steps, dropped = recorder.take(), counters.steps, dict(counters.dropped_rows)
    request_id, again = serve(OPTIONS)
    trace = ended_trace(llm, request_id)
    result = {
        "prompt_len": len(prompt),
        "num_tokens": len(tokens),
        "tokens_again": again == tokens,
        "rows_per_layer_and_head": sorted(set(running_observer().measurer.copy(0.0).rows.sum(-1).flatten().tolist())),
        "num_rows": len(rows) + len(recorder.take()),
        "shape": list(rows[0].stats.shape),
        "steps": steps,
        "dropped": dropped,
        "phase_of_position": [(row.position, row.phase) for row in rows],
        "errors": errors_of(tokens, {row.position: row.stats for row in rows}),
        "trace_positions": trace.positions.tolist(),
        "trace_errors": errors_of(tokens, dict(zip(trace.positions.tolist(), trace.stats, strict=True))),
        "trace_notes": list(trace.notes),
        "sum_errors": sum_errors(eager, trace, tokens),
    }
    sys.stdout.write(f"RESULT {json.dumps(result)}\n")
    sys.stdout.flush()


def sum_errors(eager: EagerModel, trace: RequestTrace, tokens: list[int]) -> dict[str, float]:
    """Largest deviation of what a trace's rows add up to, of singular values relative to the largest."""
    truth = whole_truth(eager, tokens)
    expected = truth.singular_values(7, 3)[:16]
    return {
        "received": float(np.abs(trace.received - truth.received).max()),
        "previous_mass": float(np.abs(trace.previous_mass - truth.previous.transpose(2, 0, 1))[1:].max()),
        "singular_values": float(np.abs(trace.singular_values[7, 3] - expected).max() / expected[0]),
        "logprobs": float(np.abs(trace.logprobs - truth.logprobs[trace.prompt_len - 1 :]).max()),
    }


def ended_trace(llm: Any, request_id: str) -> RequestTrace:
    """The trace of a request that has ended, once it is written."""
    deliver_ends(llm)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        trace = TraceDirectory(rundir.run_dir()).get(request_id)
        if trace is not None and trace.status == "finished":
            return trace
        time.sleep(0.1)
    raise TimeoutError("the trace was not written within 30 s")


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(sys.argv[1], sys.argv[2])
