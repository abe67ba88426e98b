"""Program of the tests: serves six prompts with one release of vLLM and prints, as JSON, what was served and measured.

    PYTHONPATH=FOLDER_OF_THE_RELEASE:REPOSITORY python tests/releases/smoke.py MODEL

Two releases that compute alike print the same but for `vllm`: numbers are compared by their bits, so arrays are told as
digests and sums as hexadecimal floats. In one process, all requests are in the scheduler before the first step.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

NUM_TOKENS: Final = 40
# Smaller than the longer prompts, which are prefilled in chunks beside others' decode rows.
CHUNK: Final = 96
TRACED: Final = 2
OPTIONS: Final[Mapping[str, Any]] = {
    "glassbox": "trace",
    "glassbox_top_k": 3,
    "glassbox_rows": 1,
    "glassbox_spans": ["head=0:4"],
}
CONFIG: Final = "sample_rate: 1.0\nexport: {interval_s: 1}\n"
_TRACE_TIMEOUT_S: Final = 120.0
_TEXT: Final = (
    "The attention of a language model decides which earlier words each new word is made from. "
    "Operators of a server seldom see it, although a broken template or a wrong rotary base shows there first. "
)


def make_prompts(tokenizer: Any) -> list[list[int]]:
    """Six prompts of 5 to 250 tokens; two begin alike, so that a prefix is found in the cache."""
    long = tokenizer.encode(_TEXT * 8)
    return [
        tokenizer.encode("The capital of France is"),
        tokenizer.encode("def fibonacci(n):\n    "),
        long[:130],
        long[:250],
        tokenizer.encode("Once upon a time there was a small robot who"),
        long[40:150],
    ]


def digest(array: np.ndarray) -> str:
    """Of an array's type, shape and bytes."""
    content = np.ascontiguousarray(array)
    return hashlib.sha256(f"{content.dtype} {content.shape} ".encode() + content.tobytes()).hexdigest()[:16]


def measured() -> dict[str, Any]:
    """What the plugin of this process has measured, statistic by statistic; nothing if it did not attach."""
    from glassbox.adapter.seat import SEAT
    from glassbox.core.statistics import PHASES, STATISTICS

    worker = getattr(SEAT.hook, "worker", None)
    if worker is None:
        return {"attached": False}
    snapshot = worker.snapshot()
    numbers = snapshot.numbers
    places = {
        f"{statistic.name}.{phase}": (i, j) for i, statistic in enumerate(STATISTICS) for j, phase in enumerate(PHASES)
    }
    return {
        "attached": True,
        "steps": numbers["steps"],
        "sampled_steps": numbers["sampled_steps"],
        "errors": dict(numbers["errors"]),
        "layers": {
            "observed": numbers["layers_observed"],
            "bypassed": {reason: count for reason, count in numbers["layers_bypassed"].items() if count},
        },
        "rows": dict(zip(PHASES, snapshot.rows.sum((0, 1)).tolist(), strict=True)),
        "rows_by_head": {phase: digest(snapshot.rows[..., i]) for i, phase in enumerate(PHASES)},
        "counts": {name: digest(snapshot.counts[:, :, phase, one]) for name, (one, phase) in places.items()},
        "sums": {name: digest(snapshot.sums[:, :, phase, one]) for name, (one, phase) in places.items()},
        # Of the first layer's first head, to see by how much sums differ.
        "first_sums": {
            name: float(snapshot.sums[:1, :1, phase, one].sum()).hex() for name, (one, phase) in places.items()
        },
    }


def traced(llm: Any) -> dict[str, Any]:
    """The one trace, once it has ended and lies in the run directory."""
    from glassbox.adapter.offline_engine import deliver_ends
    from glassbox.store import rundir
    from glassbox.store.trace_directory import TraceDirectory

    deliver_ends(llm)
    directory = TraceDirectory(rundir.run_dir())
    deadline = time.monotonic() + _TRACE_TIMEOUT_S
    while time.monotonic() < deadline:
        if any(summary.status != "active" for summary in directory.summaries()):
            (trace,) = directory.read()
            return {
                "status": trace.status,
                "prompt_len": trace.prompt_len,
                "num_generated": trace.num_generated,
                "truncated": trace.truncated,
                "positions": trace.positions.tolist(),
                "arrays": dict(sorted(_digests(trace))),
            }
        time.sleep(0.05)
    return {"status": "missing"}


def _digests(trace: Any) -> Iterator[tuple[str, str]]:
    """Of each array by name; of those along the rows once for each phase."""
    from glassbox.core.statistics import PHASES
    from glassbox.core.trace_arrays import TRACE_ARRAYS

    for array in TRACE_ARRAYS:
        values = trace.arrays[array.name]
        for i, phase in enumerate(PHASES):
            rows = np.flatnonzero(trace.phases == i)
            if array.ragged:
                yield f"{array.name}.{phase}", digest(np.concatenate([trace.attention(t).ravel() for t in rows]))
            elif array.by_token:
                yield f"{array.name}.{phase}", digest(values[rows])
        if not array.by_token:
            yield array.name, digest(values)


def main(model: str) -> None:
    """Serve the prompts and print what came of it."""
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        enable_prefix_caching=True,
        seed=0,
    )
    prompts = make_prompts(llm.get_tokenizer())
    params = [
        SamplingParams(
            temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, extra_args=dict(OPTIONS) if i == TRACED else None
        )
        for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    found = measured()
    result = {
        "vllm": vllm.__version__,
        "from": str(Path(vllm.__file__).parents[1]),
        "runner": f"{type(runner).__module__}.{type(runner).__qualname__}",
        "prompt_lens": [len(prompt) for prompt in prompts],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "measured": found,
        "trace": traced(llm) if found["attached"] and found["layers"]["observed"] else None,
    }
    sys.stdout.write(f"RESULT {json.dumps(result)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(*sys.argv[1:])
