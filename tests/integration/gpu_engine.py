"""One vLLM on the GPU in a process of its own: serves prompts, saves the tokens and what glassbox accumulated.

    python -m tests.integration.gpu_engine SPEC.json

The spec is the `EngineSpec` below as JSON; results go to `<out>.npz` and `<out>.json`.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class EngineSpec:
    """What to run.

    Attributes:
        model: folder.
        prompts: token ids; `max_tokens` of each.
        out: path without suffix.
        backend: `--attention-backend`, or None for vLLM's choice.
        config: glassbox's YAML as a mapping; None sets GLASSBOX_DISABLE=1.
        v2_runner: VLLM_USE_V2_MODEL_RUNNER.
    """

    model: str
    prompts: list[list[int]]
    max_tokens: list[int]
    out: str
    backend: str | None = None
    dtype: str = "bfloat16"
    eager: bool = False
    v2_runner: bool = True
    kv_cache_dtype: str = "auto"
    config: dict[str, Any] | None = None
    llm_args: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Save as JSON."""
        path.write_text(json.dumps(asdict(self)))


def _environment(spec: EngineSpec) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if spec.v2_runner else "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["GLASSBOX_RUN_DIR"] = f"{spec.out}-run"
    if spec.config is None:
        os.environ["GLASSBOX_DISABLE"] = "1"
    else:
        path = Path(f"{spec.out}.yaml")
        path.write_text(json.dumps(spec.config))  # JSON is YAML
        os.environ["GLASSBOX_CONFIG"] = str(path)


def run(spec: EngineSpec) -> None:
    """Serve the prompts once to warm up with nothing counted, and once for real."""
    _environment(spec)
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        spec.model,
        dtype=spec.dtype,
        enforce_eager=spec.eager,
        attention_backend=spec.backend,
        kv_cache_dtype=spec.kv_cache_dtype,
        max_model_len=2048,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=1 << 30,
        seed=0,
        **spec.llm_args,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in spec.prompts],
        [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in spec.max_tokens],
        use_tqdm=False,
    )
    torch.cuda.synchronize()
    report: dict[str, Any] = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    if spec.config is not None:
        from glassbox.step import hook

        observer, worker = hook().observer, hook()._worker
        report["errors"] = hook()._errors.counts()
        if observer is not None and worker is not None:
            snapshot = worker.snapshot()
            report |= {
                "steps": snapshot.steps,
                "sampled_steps": snapshot.sampled_steps,
                "layers": list(snapshot.layers),
                "backend": snapshot.build["backend"],
                "glassbox_bytes": observer.measurer.nbytes,
                "runner": type(llm.llm_engine.model_executor.driver_worker.worker.model_runner).__module__,
            }
            np.savez(
                f"{spec.out}.npz",
                counts=snapshot.counts,
                sums=snapshot.sums,
                rows=snapshot.rows,
                nonfinite=snapshot.nonfinite,
                window_max=snapshot.window_max,
            )
    Path(f"{spec.out}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    run(EngineSpec(**json.loads(Path(sys.argv[1]).read_text())))
