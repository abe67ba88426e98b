"""What a request with `glassbox_prompt: all` costs in vLLM on one GPU, itself and those beside it.

    python -m tests.bench.bench_gpu_prompts --out docs/data/whole_prompts_h200.csv

One engine with the plugin and random weights in the shape of Llama-3.1-8B. A prompt of 8,192 tokens is served alone
(one output token) and beside 16 requests that decode 64 tokens, in turns without a trace and with traces of several
kinds; reported are the medians, their ratio to those without a trace, and whether the tokens of the others and its own
stayed what they were. `delivered_s` is how long after the answer the trace lay in the run directory.
"""

import argparse
import csv
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from tests.bench.bench_gpu import LLAMA

PROMPT, OTHERS, OUTPUT = 8192, 16, 64
TRACE: Final[dict[str, Any]] = {"glassbox": "trace"}
WHOLE: Final = {**TRACE, "glassbox_prompt": "all"}
KINDS: Final[dict[str, dict[str, Any] | None]] = {
    "no trace": None,
    "sampled rows": TRACE,
    "whole prompt": WHOLE,
    "whole prompt, 4 spans": {**WHOLE, "glassbox_spans": ["a=0:64", "b=64:4000", "c=4000:8000", "d=8000:8192"]},
    "whole prompt, laplacian and spectral": {**WHOLE, "glassbox_signals": ["laplacian", "spectral"]},
    "whole prompt, 4 layers": {**WHOLE, "glassbox_layers": [0, 10, 20, 31]},
}
CONFIG: Final[dict[str, Any]] = {
    "sample_rate": 0.01,
    # A trace is some 400 MB: few are kept.
    "requests": {"max_trace_mb": 4096, "max_active_mb": 16384, "keep_mb": 4096, "keep": 4},
    "export": {"interval_s": 0.2},
}


class Engine:
    """vLLM in this process."""

    def __init__(self, folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(LLAMA))
        (folder / "glassbox.yaml").write_text(json.dumps(CONFIG))
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "GLASSBOX_CONFIG": str(folder / "glassbox.yaml"),
            "GLASSBOX_RUN_DIR": str(folder / "run"),
        }
        from vllm import LLM

        self._run_dir = folder / "run"
        self._llm = LLM(
            str(folder / "model"),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=16384,
            max_num_batched_tokens=PROMPT,
            gpu_memory_utilization=0.5,
            kv_cache_memory_bytes=8 << 30,
            enable_prefix_caching=False,
            attention_backend=os.environ.get("BACKEND") or None,
            seed=0,
        )
        rng = random.Random(0)
        self._long = rng.choices(range(1000, 100000), k=PROMPT)
        self._short = [rng.choices(range(1000, 100000), k=64) for _ in range(OTHERS)]

    def run(self, kind: dict[str, Any] | None, *, beside: bool) -> tuple[float, list[list[int]], str]:
        """Seconds, tokens of the others and of the long prompt, its id."""
        from vllm import SamplingParams

        prompts = [*(self._short if beside else []), self._long]
        params = [
            SamplingParams(max_tokens=OUTPUT, ignore_eos=True, temperature=0, detokenize=False) for _ in prompts[:-1]
        ]
        params.append(SamplingParams(max_tokens=1, ignore_eos=True, temperature=0, detokenize=False, extra_args=kind))
        start = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, [list(output.outputs[0].token_ids) for output in outputs], outputs[-1].request_id

    def delivered(self, request_id: str) -> tuple[float, Any]:
        """Seconds until the trace of a request lies in the run directory, and the trace."""
        from glassbox.adapter.offline_engine import deliver_ends
        from glassbox.store.trace_directory import TraceDirectory

        start = time.perf_counter()
        deliver_ends(self._llm)
        while time.perf_counter() - start < 60:
            found = TraceDirectory(self._run_dir).traces(request_id)
            if found and found[0].status != "active":
                return time.perf_counter() - start, found[0]
            time.sleep(0.05)
        return time.perf_counter() - start, None

    def errors(self) -> dict[str, int]:
        """What glassbox has counted."""
        from tests.attached import attached_hook

        return attached_hook().errors.counts()


def measure(engine: Engine, rounds: int) -> list[dict[str, Any]]:
    """All kinds in turns."""
    times: dict[tuple[str, bool], list[float]] = {}
    tokens: dict[bool, list[list[int]]] = {}
    same = dict.fromkeys(KINDS, True)
    delivered: dict[str, tuple[float, Any]] = dict.fromkeys(KINDS, (0.0, None))
    for turn in range(rounds + 1):
        for beside in (False, True):
            for name, kind in KINDS.items():
                seconds, found, request_id = engine.run(kind, beside=beside)
                same[name] &= found == tokens.setdefault(beside, found)
                if kind is not None:
                    delivered[name] = engine.delivered(request_id)
                if turn:
                    times.setdefault((name, beside), []).append(seconds)
    medians = {key: statistics.median(of) for key, of in times.items()}
    lines = []
    for name in KINDS:
        after_s, trace = delivered[name]
        lines.append({
            "request": name,
            "alone_ms": f"{1e3 * medians[name, False]:.1f}",
            "alone_ratio": f"{medians[name, False] / medians['no trace', False]:.3f}",
            "beside_16_ms": f"{1e3 * medians[name, True]:.1f}",
            "beside_16_ratio": f"{medians[name, True] / medians['no trace', True]:.3f}",
            "same_tokens": same[name],
            "delivered_s": f"{after_s:.2f}",
            "rows": 0 if trace is None else len(trace.positions),
            "notes": "" if trace is None else "; ".join(trace.notes),
        })  # fmt: skip
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(Path(folder))
        lines = measure(engine, args.rounds)
        import torch
        import vllm

        about = {
            "rounds": args.rounds, "gpu": torch.cuda.get_device_name(), "vllm": vllm.__version__,
            "torch": torch.__version__, "commit": args.commit, "command": "python -m tests.bench.bench_gpu_prompts",
        }  # fmt: skip
        print("errors", engine.errors())
    for line in lines:
        print(*line.values(), flush=True)
    out = args.out.open("w", newline="", encoding="utf-8") if args.out else sys.stdout
    writer = csv.DictWriter(out, fieldnames=[*lines[0], *about])
    writer.writeheader()
    writer.writerows({**line, **about} for line in lines)


if __name__ == "__main__":
    main()
