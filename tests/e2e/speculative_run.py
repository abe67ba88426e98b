"""Program of the tests: speculative decoding in process, its measured rows against transformers, as JSON.

    python tests/e2e/speculative_run.py MODEL {ngram|draft_model}

The draft model is the model itself, so that its layers would be taken for the model's if they were not told apart.

A step verifies the drafted tokens, so it has several decode rows of one request. Rows of rejected drafts are measured,
too (they were computed); the last row measured at a position is the one whose token was kept.
"""

import json
import os
import sys
from pathlib import Path
from typing import Final

import numpy as np
import torch

from glassbox.core.statistics import INDEX
from tests.integration.row_recorder import RowRecorder
from tests.integration.transformers_truth import EagerModel

DRAFT_TOKENS: Final = 3
NUM_TOKENS: Final = 40
LOOKUP: Final = {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
SINK_TOKENS, LOCAL_WINDOW = 4, 128


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
    prompt = AutoTokenizer.from_pretrained(model).encode("one two three four five one two three four five one two")
    (output,) = llm.generate(
        [{"prompt_token_ids": prompt}],
        SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True),
        use_tqdm=False,
    )
    tokens = [*prompt, *output.outputs[0].token_ids]
    rows = recorder.take()
    kept = {row.position: row for row in rows}
    truth = EagerModel(Path(model), torch.float32).truth(tokens, len(prompt), SINK_TOKENS, LOCAL_WINDOW)
    names = ("sink_ratio", "local_ratio", "top1_ratio", "entropy_ratio")
    errors = dict.fromkeys(names, 0.0)
    for position, row in kept.items():
        if position >= len(tokens) - 1:
            continue  # drafts beyond the end
        for name in names:
            difference = row.stats[..., INDEX[name]] - truth.values[name][..., position]
            if name == "entropy_ratio":
                difference = difference * np.log(position + 1)  # in nats, as the tolerance is
            errors[name] = max(errors[name], float(np.abs(difference).max()))
    observer = running_observer()
    result = {
        "prompt_len": len(prompt),
        "num_tokens": len(tokens),
        "rows_per_layer_and_head": sorted(set(observer.measurer.copy(0.0).rows.sum(-1).flatten().tolist())),
        "num_rows": len(rows),
        "shape": list(rows[0].stats.shape),
        "steps": observer.counters.steps,
        "phase_of_position": sorted({(row.position, row.phase) for row in rows}),
        "num_decode_rows": sum(row.phase for row in rows),
        "errors": errors,
    }
    sys.stdout.write(f"RESULT {json.dumps(result)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(sys.argv[1], sys.argv[2])
