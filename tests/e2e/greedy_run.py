"""Program of the tests: one batch of greedy completions through an in-process vLLM; prints what came out as JSON.

    python tests/e2e/greedy_run.py MODEL {eager|compiled} DTYPE

In one process, all requests are in the scheduler before the first step, so two runs have the same batches.
"""

import json
import os
import sys
from typing import Any, Final

NUM_TOKENS: Final = 64
# Smaller than the longest prompts, which are prefilled in chunks beside others' decode rows.
CHUNK: Final = 256

_TEXT: Final = (
    "The attention of a language model decides which earlier words each new word is made from. "
    "Operators of a server seldom see it, although a broken template or a wrong rotary base shows there first. "
    "In the harbour town of Lindholm the ferries leave every forty minutes, even in winter. "
)
_QUESTIONS: Final = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a small robot who",
    "1, 1, 2, 3, 5, 8, 13,",
)


def make_prompts(tokenizer: Any) -> list[list[int]]:
    """Eight prompts of 5 to 900 tokens; two begin alike, so that a prefix is found in the cache."""
    long = tokenizer.encode(_TEXT * 20)
    return [
        *(tokenizer.encode(question) for question in _QUESTIONS),
        long[:120],
        long[:300],
        long[17:600],
        long[5:905],
    ]


def measured() -> dict[str, int]:
    """What the plugin of this process has counted; zeros if it is not there."""
    seat = sys.modules.get("glassbox.adapter.seat")
    observer = seat.SEAT.listener if seat else None
    if observer is None:
        return {"steps": 0, "sampled_steps": 0, "rows": 0}
    counters = observer.counters
    return {
        "steps": counters.steps,
        "sampled_steps": counters.sampled_steps,
        "rows": int(observer.measurer.copy(0.0).rows.sum()),
    }


def main(model: str, mode: str, dtype: str) -> None:
    """Serve the prompts once and print tokens and counters."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype=dtype,
        enforce_eager=mode == "eager",
        max_model_len=1024,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        seed=0,
    )
    prompts = make_prompts(llm.get_tokenizer())
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True),
        use_tqdm=False,
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    result = {"prompt_lens": [len(prompt) for prompt in prompts], "tokens": tokens, "measured": measured()}
    sys.stdout.write(f"RESULT {json.dumps(result)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(*sys.argv[1:])
