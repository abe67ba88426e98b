"""vLLM with three tensor-parallel ranks on a CPU, of which the second has a broken kernel; prints what glassbox says.

GLASSBOX_RUN_DIR=... GLASSBOX_CONFIG=... python -m tests.integration.ranks_engine FOLDER
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from tests.program import RESULT, write_plugin

# Each rank tells of its layers with its next snapshot.
_SETTLED_S: Final = 60.0

RANKS, BROKEN_RANK, BROKEN_LAYER, BROKEN_HEAD = 3, 1, 12, 2


def break_one_rank() -> None:
    """A plugin of vLLM: in one rank a head's output is 5 % too large."""
    from vllm.distributed import get_tp_group
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    original = CPUAttentionBackendImpl.forward

    def forward(impl: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(impl, layer, *args, **kwargs)
        if f".{BROKEN_LAYER}." in layer.layer_name and get_tp_group().rank_in_group == BROKEN_RANK:
            output.view(len(output), impl.num_heads, -1)[:, BROKEN_HEAD] *= 1.05
        return output

    CPUAttentionBackendImpl.forward = forward


def main(folder: Path) -> None:
    """Serve, and print what the ranks' snapshots say together."""
    write_plugin(folder, "vllm.general_plugins", "tests.integration.ranks_engine:break_one_rank")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    from vllm import LLM, SamplingParams

    from glassbox.cli.demo.demo_model import demo_model
    from glassbox.core.output_checks import LayerState
    from glassbox.store.merge import merge
    from glassbox.store.snapshot import read_snapshots

    llm = LLM(
        str(demo_model()),
        dtype="float32",
        max_model_len=512,
        tensor_parallel_size=RANKS,
        distributed_executor_backend="mp",
        enforce_eager=True,
        gpu_memory_utilization=0.3,
    )
    prompts = ["The capital of France is Paris and the weather there is " * 8] * 3
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    deadline = time.monotonic() + _SETTLED_S
    while True:
        snapshots = read_snapshots(Path(os.environ["GLASSBOX_RUN_DIR"]))
        engines = merge(snapshots)
        known = len(snapshots) == RANKS and not (engines[0].checks.state == LayerState.PENDING).any()
        if known or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    (engine,) = engines
    print(
        RESULT
        + json.dumps({
            "ranks": len(snapshots),
            "states": engine.checks.state.tolist(),
            "wrong": [[one.layer, one.head, one.rank, one.host] for one in engine.wrong],
            "errors": dict(engine.numbers["errors"]),  # type: ignore[call-overload]
        })
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
