"""What a check of served outputs costs on a CPU: seconds of glassbox in the steps that are checked, by check.

    python tests/bench/bench_canary_cpu.py --out docs/data/canary_cpu.csv

vLLM in this process with the demo's model, nothing sampled, four requests of 130 to 800 tokens, a check at least every
second; the first two checks are left out.
"""

import argparse
import csv
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path


def measure(dtype: str, seconds: float, cpu: str) -> dict[str, str]:
    """One engine."""
    from vllm import LLM, SamplingParams

    from glassbox.adapter.release import vllm_version
    from glassbox.adapter.seat import SEAT
    from glassbox.cli.demo.demo_model import demo_model

    llm = LLM(str(demo_model()), dtype=dtype, max_model_len=1024, gpu_memory_utilization=0.3, enforce_eager=True)
    hook = SEAT.hook
    worker = hook.worker  # type: ignore[union-attr]
    counters = worker.observer.counters
    checks: list[float] = []
    original = worker.observer.stop_step

    def stop_step() -> None:
        checked = worker.observer._step is not None and worker.observer._step.measured
        before = counters.overhead_seconds
        original()
        if checked:
            checks.append(counters.overhead_seconds - before)

    worker.observer.stop_step = stop_step
    prompts = ["The capital of France is Paris and the weather there is fine. " * n for n in (10, 20, 40, 60)]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True), use_tqdm=False)
    assert not worker.observer.counters.canary_rows["failed"]
    milliseconds = [1000 * one for one in checks[2:]]
    return {
        "dtype": dtype,
        "checks": str(len(milliseconds)),
        "median_ms": f"{statistics.median(milliseconds):.1f}",
        "largest_ms": f"{max(milliseconds):.1f}",
        "share_of_30_s": f"{statistics.mean(milliseconds) / 30_000:.5f}",
        "cpu": cpu,
        "vllm": vllm_version() or "",
        "command": f"python tests/bench/bench_canary_cpu.py --dtype {dtype}",
    }


def main() -> None:
    """Append a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--cpu", default=f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "glassbox.yaml"
        config.write_text("sample_rate: 0\ncanary: {interval_s: 1}\n", encoding="utf-8")
        os.environ |= {"GLASSBOX_CONFIG": str(config), "GLASSBOX_RUN_DIR": str(Path(folder) / "run")}
        line = measure(args.dtype, args.seconds, args.cpu) | {"commit": args.commit}
    new = not args.out.exists()
    with args.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(line))
        if new:
            writer.writeheader()
        writer.writerow(line)


if __name__ == "__main__":
    main()
