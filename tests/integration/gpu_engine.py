"""One vLLM on the GPU in a process of its own: serves prompts, saves the tokens and what glassbox measured.

    python -m tests.integration.gpu_engine SPEC.json

The spec is the `EngineSpec` below as JSON; results go to `<out>.npz` and `<out>.json`, traces to `<out>-run`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from glassbox.store.trace_record import RequestTrace

FAULTY_LAYER, FAULTY_HEAD = 7, 3
FAULTY_LATENT_LAYER: Final = 1
# sampling.prefill_rows_per_request of the engines.
PREFILL_ROWS: Final = 8


@dataclass(frozen=True)
class EngineSpec:
    """What to run.

    Attributes:
        model: folder.
        prompts: token ids; `max_tokens` and `extra_args` of each.
        out: path without suffix.
        backend: `--attention-backend`, or None for vLLM's choice.
        config: glassbox's YAML as a mapping; None sets GLASSBOX_DISABLE=1.
        v2_runner: VLLM_USE_V2_MODEL_RUNNER; None leaves it to vLLM.
        llm_args: further arguments of vllm.LLM, or others than those of `run`.
        fault: what is broken, in layer FAULTY_LAYER if it is one layer's, by name; see `_break`.
        adapter: folder of a LoRA adapter that prompts ask for; `adapted` says which of them do, None is all.
    """

    model: str
    prompts: list[list[int]]
    max_tokens: list[int]
    out: str
    extra_args: list[dict[str, Any] | None] | None = None
    backend: str | None = None
    dtype: str = "bfloat16"
    eager: bool = False
    v2_runner: bool | None = True
    kv_cache_dtype: str = "auto"
    config: dict[str, Any] | None = None
    llm_args: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    adapter: str | None = None
    adapted: list[bool] | None = None

    @property
    def run_dir(self) -> Path:
        """GLASSBOX_RUN_DIR."""
        return Path(f"{self.out}-run")

    def write(self, path: Path) -> None:
        """Save as JSON."""
        path.write_text(json.dumps(asdict(self)))


@dataclass(frozen=True)
class EngineResult:
    """What one engine left behind."""

    spec: EngineSpec

    @cached_property
    def report(self) -> dict[str, Any]:
        """Of `run`."""
        report: dict[str, Any] = json.loads(Path(f"{self.spec.out}.json").read_text())
        return report


class TracedResult(EngineResult):
    """What one engine left behind of traced requests."""

    @cached_property
    def traces(self) -> "list[list[RequestTrace]]":
        """Of each request."""
        from glassbox.store.trace_directory import TraceDirectory

        directory = TraceDirectory(self.spec.run_dir)
        return [directory.traces(request_id) for request_id in self.report["ids"]]

    def asked(self) -> "Iterator[tuple[Mapping[str, Any], list[RequestTrace], list[int]]]":
        """What each request said to glassbox, its traces, and all its tokens."""
        assert self.spec.extra_args is not None
        every = zip(self.spec.extra_args, self.traces, self.spec.prompts, self.report["tokens"], strict=True)
        return ((extra or {}, found, prompt + answer) for extra, found, prompt, answer in every)


def traced_spec(lengths: Sequence[int], kinds: Sequence[dict[str, Any] | None], config: dict[str, Any]) -> EngineSpec:
    """Requests of these prompt lengths that say these things in turn; so few KV blocks that some are preempted, and
    chunks of 64 tokens."""
    model = model_path()
    text = tokenized_text(model)
    return EngineSpec(
        str(model),
        [text[7 * i : 7 * i + n] for i, n in enumerate(lengths)],
        [20 + 3 * i for i in range(len(lengths))],
        extra_args=[kinds[i % len(kinds)] for i in range(len(lengths))],
        out="",
        config=config,
        backend="FLASH_ATTN",
        llm_args={"max_model_len": 512, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 40},
    )


def _environment(spec: EngineSpec) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if spec.v2_runner is not None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if spec.v2_runner else "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["GLASSBOX_RUN_DIR"] = str(spec.run_dir)
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

    llm_args: dict[str, Any] = {
        "dtype": spec.dtype,
        "enforce_eager": spec.eager,
        "attention_backend": spec.backend,
        "kv_cache_dtype": spec.kv_cache_dtype,
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 1 << 30,
        "seed": 0,
    }
    preemptions, late = _count_preemptions(), _note_late_kernels()
    if spec.fault is not None:
        _break(spec.fault)
    llm = LLM(spec.model, **{**llm_args, **spec.llm_args})
    adapters = None
    if spec.adapter is not None:
        from vllm.lora.request import LoRARequest

        asks = spec.adapted or [True] * len(spec.prompts)
        adapters = [LoRARequest("adapter", 1, spec.adapter) if adapted else None for adapted in asks]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in spec.prompts],
        [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False, extra_args=extra)
            for n, extra in zip(spec.max_tokens, spec.extra_args or [None] * len(spec.max_tokens), strict=True)
        ],
        lora_request=adapters,
        use_tqdm=False,
    )
    torch.cuda.synchronize()
    report: dict[str, Any] = {
        "ids": [output.request_id for output in outputs],
        "preemptions": preemptions[0],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "late_kernels": late,
    }
    if spec.config is not None:
        from tests.attached import attached_hook

        _deliver_traces(llm)
        worker = attached_hook().worker
        report["errors"] = attached_hook().errors.counts()
        if worker is not None:
            snapshot = worker.snapshot()
            report |= {
                "steps": snapshot.steps,
                "layer_states": snapshot.checks.state.tolist(),
                "error_counts": snapshot.checks.error_counts.sum(0).tolist(),
                "worst_ratio": snapshot.checks.worst_ratio.tolist(),
                "worst_head": snapshot.checks.worst_head.tolist(),
                "kv_error": snapshot.checks.kv_error.tolist(),
                "kv_saturated": snapshot.checks.kv_saturated.tolist(),
                "canary_rows": snapshot.numbers["canary_rows"],
                "layers_bypassed": snapshot.numbers["layers_bypassed"],
                "vllm": snapshot.build["vllm_version"],
                "sampled_steps": snapshot.sampled_steps,
                "layers": list(snapshot.layers),
                "backend": snapshot.build["backend"],
                "glassbox_bytes": worker.observer.measurer.nbytes,
                "runner": type(llm.llm_engine.model_executor.driver_worker.worker.model_runner).__module__,
            }
            apart = {} if snapshot.by_adapter is None else vars(snapshot.by_adapter)
            np.savez(
                f"{spec.out}.npz",
                **{f"adapter_{name}": array for name, array in apart.items()},
                counts=snapshot.counts,
                sums=snapshot.sums,
                rows=snapshot.rows,
                nonfinite=snapshot.nonfinite,
                window_max=snapshot.window_max,
            )
    Path(f"{spec.out}.json").write_text(json.dumps(report))


def _break(fault: str) -> None:
    """Break a layer, or what measures it.

    kernel: vLLM's attention gives 1.02 times the output in one head, in CUDA graphs as well; latent kernel: that of
    TRITON_MLA does, in layer FAULTY_LATENT_LAYER. scale: glassbox takes the
    scores for 1 % larger. keys: glassbox reads the keys of the slot before. compile: the row kernel can't be compiled,
    but amid a capture it could.
    """
    if fault == "compile":
        import torch

        from glassbox.kernels import row_stats

        launch = row_stats._row_stats_kernel.run

        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.cuda.is_current_stream_capturing():
                return launch(*args, **kwargs)
            raise RuntimeError("ptxas is out of order")

        row_stats._row_stats_kernel.run = run
        return
    from glassbox.adapter.attention import layer_view

    if fault == "kernel":
        from vllm.v1.attention.backends import flash_attn

        original = flash_attn.FlashAttentionImpl.forward

        def forward(self: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, layer, *args, **kwargs)
            if f".{FAULTY_LAYER}." in layer.layer_name:
                output.view(output.shape[0], self.num_heads, -1)[:, FAULTY_HEAD] *= 1.02
            return output

        flash_attn.FlashAttentionImpl.forward = forward
        return
    if fault == "latent kernel":
        from vllm.v1.attention.backends.mla import triton_mla

        decode = triton_mla.TritonMLAImpl.forward_mqa

        def forward_mqa(self: Any, q: Any, cache: Any, metadata: Any, layer: Any) -> Any:
            output, lse = decode(self, q, cache, metadata, layer)
            if f".{FAULTY_LATENT_LAYER}." in layer.layer_name:
                output[:, FAULTY_HEAD] *= 1.02
            return output, lse

        triton_mla.TritonMLAImpl.forward_mqa = forward_mqa
        return
    view = layer_view.StridedView
    made: Any = view.__init__

    def __init__(self: Any, impl: Any, layer: Any, *args: Any) -> None:
        made(self, impl, layer, *args)
        if f".{FAULTY_LAYER}." in layer.layer_name and fault == "scale":
            self.params = replace(self.params, scale=1.01 * self.params.scale)

    def keys(self: Any, kv_cache: Any = None) -> Any:
        found = read(self, kv_cache)
        return found.roll(1, 2) if f".{FAULTY_LAYER}." in self.name else found

    view.__init__ = __init__  # type: ignore[method-assign]
    if fault == "keys":
        read: Any = view.keys
        view.keys = keys  # type: ignore[method-assign]


def _count_preemptions() -> list[int]:
    from vllm.v1.core.sched.scheduler import Scheduler

    count, original = [0], Scheduler._preempt_request

    def counting(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(*args, **kwargs)

    Scheduler._preempt_request = counting
    return count


def _note_late_kernels() -> list[str]:
    """Kernels of glassbox whose programs are asked for after warm-up, by a step that waits for them."""
    from triton import knobs

    from glassbox.adapter.seat import SEAT

    late: list[str] = []

    def note(*, fn: Any, **_: Any) -> None:
        worker = getattr(SEAT.hook, "worker", None)
        if worker is not None and worker.observer.armed and fn.module.startswith("glassbox."):
            late.append(fn.name)

    knobs.runtime.jit_cache_hook = note
    return late


def _deliver_traces(llm: Any) -> None:
    """Wait until the traces of all ended requests lie in the run directory."""
    from glassbox.adapter.offline_engine import deliver_ends
    from tests.attached import attached_hook

    deliver_ends(llm)
    worker = attached_hook().worker
    deadline = time.monotonic() + 30
    while worker is not None and time.monotonic() < deadline:
        worker._deferred.finish()
        if not worker._requests.active() and not worker._requests.ended():
            return
        time.sleep(0.05)


def run_engines(specs: Mapping[str, EngineSpec], folder: Path, at_once: int = 6) -> None:
    """Run engines, each in its own process, a few side by side; the log of one that fails is printed."""
    waiting, running = list(specs.items()), []
    while waiting or running:
        while waiting and len(running) < at_once:
            name, spec = waiting.pop(0)
            spec.write(folder / f"{name}.spec.json")
            log = (folder / f"{name}.log").open("w")
            command = [sys.executable, "-m", "tests.integration.gpu_engine", str(folder / f"{name}.spec.json")]
            running.append((name, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)))
        name, process = running.pop(0)
        if process.wait(timeout=400) != 0:
            print(f"--- {name}\n{(folder / f'{name}.log').read_text()[-6000:]}")


def measured_positions(prompt_len: int, length: int) -> tuple[list[int], list[int]]:
    """(prompt positions, generated positions) that have a row; the last sampled token is never fed back."""
    if prompt_len <= PREFILL_ROWS:
        prompt = list(range(prompt_len))
    else:
        prompt = [-(-(k + 1) * prompt_len // PREFILL_ROWS) - 1 for k in range(PREFILL_ROWS)]
    return prompt, list(range(prompt_len, length - 1))


def model_path() -> Path:
    """Folder of the demo's model; GLASSBOX_TEST_MODEL where it can't be downloaded."""
    from glassbox.cli.demo.demo_model import demo_model

    return Path(os.environ["GLASSBOX_TEST_MODEL"]) if "GLASSBOX_TEST_MODEL" in os.environ else demo_model()


def tokenized_text(model: Path) -> list[int]:
    """A long text as token ids."""
    from transformers import AutoTokenizer

    text = (
        "The attention of a language model decides which earlier words each new word is made from. "
        "Operators seldom see it, although a broken template or a wrong rotary base shows there first. "
    )
    ids: list[int] = AutoTokenizer.from_pretrained(model).encode(text * 40)
    return ids


if __name__ == "__main__":
    run(EngineSpec(**json.loads(Path(sys.argv[1]).read_text())))
