"""Throughput of vLLM on one GPU with glassbox and without, in turns.

Each arm is an engine in a process of its own, all on the same GPU, started once; the parent runs them one at a time.

    python tests/bench/bench_gpu.py start DIR            # engines `plain`, `glassbox`, `again`; wait for all
    python tests/bench/bench_gpu.py run DIR --out CSV    # rounds over all cases and settings
    python tests/bench/bench_gpu.py stop DIR

The model has random weights and the shape of Llama-3.1-8B, or with `--model deepseek` that of DeepSeek-V2's attention
(MLA, 128 heads) in 24 dense layers, 8 B parameters; `--tensor-parallel 2` spreads each engine over two GPUs.
`plain` and `again` run without the plugin: engines differ for as long as they live (where their weights and caches
lie), and how far these two are apart is what that makes. The ratio of a setting is taken against the mean of the two
in the same round; reported are the median and the extremes of these ratios. `replay_ms` is the GPU time of one replayed
decode graph by CUDA events (of the first rank), which the host's noise does not reach.
"""

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "num_hidden_layers": 24,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 24,  # no experts
    "n_routed_experts": 8,
    "moe_intermediate_size": 1536,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 102400,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MODELS = {"llama": LLAMA, "deepseek": DEEPSEEK}
PLAIN = ("plain", "again")
ARMS = ("plain", "glassbox", "again")
CASES = ("64:512:256", "1:512:128", "16:8192:64", "256:128:128", "32:4096:8")
SETTINGS: dict[str, dict[str, Any]] = {
    "enabled: false": {"enabled": False},
    "sample_rate 0": {"sample_rate": 0.0},
    "sample_rate 0.01": {"sample_rate": 0.01},
    "sample_rate 0.1": {"sample_rate": 0.1},
    "sample_rate 1.0": {"sample_rate": 1.0},
    "sample_rate 0.1, 4 layers a step": {"sample_rate": 0.1, "sampling": {"layers_per_step": 4}},
    "1 % traced": {"sample_rate": 0.01, "requests": {"trace_rate": 0.01}},
}
# Room for 16 x 8,256 tokens; three engines share a GPU.
KV_CACHE_BYTES = {"llama": 17 << 30, "deepseek": 6 << 30}
CONFIG_EFFECT_S = 1.5  # an edit is in force within two seconds of saving; observed: well under one


def serve(folder: Path, arm: str) -> None:
    """One engine: answers `case` by (seconds, output tokens, median GPU milliseconds of a graph replay)."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["GLASSBOX_DISABLE"] = "0" if arm == "glassbox" else "1"
    os.environ["GLASSBOX_CONFIG"] = str(folder / "glassbox.yaml")
    os.environ["GLASSBOX_RUN_DIR"] = str(folder / "run")
    from vllm import LLM, SamplingParams

    bench = json.loads((folder / "bench.json").read_text())
    ranks = bench["tensor_parallel"]
    llm = LLM(
        str(folder / "model"),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=32768,
        gpu_memory_utilization=0.25,
        kv_cache_memory_bytes=KV_CACHE_BYTES[bench["model"]] // ranks,
        enable_prefix_caching=False,
        attention_backend=os.environ.get("BACKEND") or None,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else None,
    )
    llm.collective_rpc(record_replays)

    def run(case: str) -> dict[str, float]:
        batch, inputs, outputs = map(int, case.split(":"))
        random.seed(0)
        prompts = [{"prompt_token_ids": random.choices(range(1000, 100000), k=inputs)} for _ in range(batch)]
        params = SamplingParams(max_tokens=outputs, ignore_eos=True, temperature=0, detokenize=False)
        llm.collective_rpc(take_replays)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        times = llm.collective_rpc(take_replays)[0]
        # Decode steps replay one full graph each; a prefill's piecewise graphs are short and many.
        decode = [t for t in times if t > 0.5 * max(times)] if times else []
        return {
            "seconds": seconds,
            "tokens_per_s": batch * outputs / seconds,
            "replay_ms": statistics.median(decode) if decode else float("nan"),
            "replays": len(decode),
        }

    for case in ("8:128:16", *CASES):
        run(case)
    with Listener(str(folder / f"{arm}.sock"), "AF_UNIX") as listener:
        while True:
            with listener.accept() as connection:
                request = connection.recv()
                if request == "stop":
                    return
                connection.send(llm.collective_rpc(worker_info) if request == "info" else run(request))


def record_replays(worker: Any) -> None:
    """In a worker: put a CUDA event before and after every graph replay."""
    import torch

    inside, replays = False, []

    def record(original: Any) -> Any:
        def replay(self: Any) -> None:
            nonlocal inside
            if inside:  # a subclass's replay that calls torch's
                return original(self)
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            inside = True
            before.record()
            original(self)
            after.record()
            inside = False
            replays.append((before, after))
            return None

        return replay

    classes: list[Any] = [torch.cuda.CUDAGraph, *torch.cuda.CUDAGraph.__subclasses__()]
    for cls in classes:
        cls.replay = record(cls.replay)
    worker.bench_replays = replays


def take_replays(worker: Any) -> list[float]:
    """In a worker: GPU milliseconds of each replay since the last call."""
    import torch

    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in worker.bench_replays]
    worker.bench_replays.clear()
    return times


def worker_info(_: Any) -> dict[str, Any]:
    """In a worker: what it runs on, and what glassbox did in it."""
    import torch

    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "allocated_mib": torch.cuda.memory_allocated() / 2**20,
        "reserved_mib": torch.cuda.memory_reserved() / 2**20,
    }
    if os.environ["GLASSBOX_DISABLE"] == "0":
        from glassbox.adapter.seat import SEAT

        hooked: Any = SEAT.hook
        report["errors"] = hooked.errors.counts()
        if hooked.worker is not None:
            snapshot = hooked.worker.snapshot()
            report |= {
                "steps": snapshot.steps,
                "sampled_steps": snapshot.sampled_steps,
                "rows": int(snapshot.rows.sum()),
                "layers_observed": len(snapshot.layers),
                "backend": snapshot.build["backend"],
                "glassbox_mib": hooked.worker.observer.measurer.nbytes / 2**20,
            }
    return report


def ask(folder: Path, arm: str, request: str) -> Any:
    """Send one request to an arm and wait for the answer."""
    with Client(str(folder / f"{arm}.sock"), "AF_UNIX") as connection:
        connection.send(request)
        return None if request == "stop" else connection.recv()


def start(folder: Path, model: str, tensor_parallel: int) -> None:
    """Start the arms side by side (their KV caches have a fixed size) and return when all are ready."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(MODELS[model]))
    (folder / "bench.json").write_text(json.dumps({"model": model, "tensor_parallel": tensor_parallel}))
    write_config(folder, SETTINGS["sample_rate 1.0"])
    processes = {}
    for arm in ARMS:
        log = (folder / f"{arm}.log").open("w")
        processes[arm] = subprocess.Popen(
            [sys.executable, __file__, "serve", str(folder), "--arm", arm],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    began = time.monotonic()
    for arm, process in processes.items():
        while not (folder / f"{arm}.sock").exists():
            if process.poll() is not None:
                sys.exit(f"{arm} ended:\n{(folder / f'{arm}.log').read_text()[-5000:]}")
            time.sleep(0.5)
        print(f"{arm} ready after {time.monotonic() - began:.0f} s", flush=True)


def write_config(folder: Path, setting: dict[str, Any]) -> None:
    """Put a setting in force in the arm `glassbox`."""
    fresh = folder / "glassbox.new"
    fresh.write_text(json.dumps(setting))
    fresh.replace(folder / "glassbox.yaml")


def run_rounds(folder: Path, rounds: int, cases: list[str], names: list[str], out: Path, deadline_s: float) -> None:
    """Measure and append to `out` after each round, so that a time-out loses at most one round."""
    info = {arm: ask(folder, arm, "info") for arm in ARMS}
    print(json.dumps(info), flush=True)
    began = time.monotonic()
    results: list[dict[str, Any]] = []
    order = random.Random(0)
    for number in range(rounds):
        if number and (time.monotonic() - began) * (number + 1) / number > deadline_s:
            print(f"stopped after {number} rounds: no time for another", flush=True)
            break
        found: dict[str, dict[str, Any]] = {}
        for name in order.sample([*PLAIN, *names], len(PLAIN) + len(names)):
            arm = name if name in PLAIN else "glassbox"
            if arm == "glassbox":
                write_config(folder, SETTINGS[name])
                time.sleep(CONFIG_EFFECT_S)
            found[name] = {case: ask(folder, arm, case) for case in cases}
        for case in cases:
            plain = _mean([found[arm][case] for arm in PLAIN])
            results += [_compare(number, case, name, plain, found[name][case]) for name in found]
        _write(folder, out, results, info)
    _summarise(results, cases)
    print(json.dumps({arm: ask(folder, arm, "info") for arm in ARMS}), flush=True)


def _mean(of: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(one[key] for one in of) for key in of[0]}


def _compare(
    number: int, case: str, setting: str, plain: dict[str, float], observed: dict[str, float]
) -> dict[str, Any]:
    return {
        "round": number,
        "case": case,
        "setting": setting,
        "plain_tokens_per_s": round(plain["tokens_per_s"], 2),
        "tokens_per_s": round(observed["tokens_per_s"], 2),
        "ratio": round(observed["tokens_per_s"] / plain["tokens_per_s"], 5),
        "plain_replay_ms": round(plain["replay_ms"], 5),
        "replay_ms": round(observed["replay_ms"], 5),
        "replay_ratio": round(plain["replay_ms"] / observed["replay_ms"], 5),
    }


def _write(folder: Path, out: Path, results: list[dict[str, Any]], info: dict[str, Any]) -> None:
    import torch
    import triton
    import vllm

    bench = json.loads((folder / "bench.json").read_text())
    ranks = bench["tensor_parallel"]
    with out.open("w", newline="") as file:
        file.write(
            f"# {ranks} x {info['plain'][0]['gpu']}, vllm {vllm.__version__}, torch {torch.__version__}, "
            f"triton {triton.__version__}, backend {info['glassbox'][0].get('backend')}, "
            f"commit {os.environ.get('COMMIT', 'unknown')}\n"
            f"# command: python tests/bench/bench_gpu.py start DIR --model {bench['model']} --tensor-parallel {ranks} "
            f"&& python tests/bench/bench_gpu.py run DIR\n"
        )
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)


def _summarise(results: list[dict[str, Any]], cases: list[str]) -> None:
    for name in dict.fromkeys(r["setting"] for r in results):
        for case in cases:
            mine = [r for r in results if r["setting"] == name and r["case"] == case]
            if mine:
                ratios = sorted(r["ratio"] for r in mine)
                replay = statistics.median(r["replay_ratio"] for r in mine)
                print(
                    f"{name:18} {case:12} n={len(mine)} throughput ratio {statistics.median(ratios):.4f} "
                    f"[{ratios[0]:.4f}, {ratios[-1]:.4f}]  decode graph {replay:.4f}",
                    flush=True,
                )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["start", "serve", "run", "stop"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.csv"))
    parser.add_argument("--deadline-s", type=float, default=1e9)
    args = parser.parse_args()
    if args.command == "serve":
        serve(args.folder, args.arm)
    elif args.command == "start":
        start(args.folder, args.model, args.tensor_parallel)
    elif args.command == "run":
        run_rounds(args.folder, args.rounds, args.cases, args.settings, args.out, args.deadline_s)
    else:
        for arm in ARMS:
            ask(args.folder, arm, "stop")


if __name__ == "__main__":
    main()
