"""The faults of `glassbox demo --incident`: what breaks, how the broken model is made, which alert must tell.

Owns the table of faults and the making of model folders. A broken folder shares the healthy one's files by symbolic
links and replaces the one that is broken; vLLM serves it like any other.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from glassbox.cli.demo.broken_kernel import BROKEN_BY, BROKEN_HEAD, BROKEN_LAYER

_WEIGHTS: Final = "model.safetensors"
_CONFIG: Final = "config.json"
_WRONG_THETA: Final = 10_000.0
_SCALED_LAYER: Final = 12
_SCALED_BY: Final = 4.0
_WRONG_SCALE: Final = 0.004


@dataclass(frozen=True)
class Fault:
    """One way in which a deployment breaks.

    Attributes:
        name: of one word, for the command line; also the job in Prometheus.
        what: what is wrong, for the table.
        alert: that must fire, without the prefix `Glassbox`; no other critical one may.
        also: others that tell of it, not critical, and are waited for.
        make: writes the broken model's folder (healthy folder, new folder); None: the healthy model's server gets it.
        bare_prompts: the requests come without chat template.
        breaks_kernel: the healthy model's server computes wrongly as soon as its turn comes (`broken_kernel.py`).
        needs: why this machine can't have the fault; None if it can.
    """

    name: str
    what: str
    alert: str
    also: tuple[str, ...] = ()
    make: Callable[[Path, Path], None] | None = None
    bare_prompts: bool = False
    breaks_kernel: bool = False
    needs: Callable[[], str | None] = lambda: None


def make_variant(healthy: Path, target: Path, *replaced: str) -> None:
    """A new model folder with links to the healthy one's files, except those that are `replaced`."""
    target.mkdir(parents=True)
    for path in healthy.iterdir():
        if path.name not in replaced:
            (target / path.name).symlink_to(path.resolve())


def wrong_rope_theta(healthy: Path, target: Path) -> None:
    """`rope_theta` is what it was in the first Llama, not what this model was trained with."""
    make_variant(healthy, target, _CONFIG)
    config = json.loads((healthy / _CONFIG).read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] = _WRONG_THETA
    (target / _CONFIG).write_text(json.dumps(config), encoding="utf-8")


def wrong_key_scale(healthy: Path, target: Path) -> None:
    """FP8 KV cache with a scale of the keys at which a quarter of their elements is cut off."""
    quantise_cache(healthy, target, k_scale=_WRONG_SCALE, v_scale=1.0)


def wrong_value_scale(healthy: Path, target: Path) -> None:
    """FP8 KV cache with a scale of the values at which some elements are cut off, most in the upper layers."""
    quantise_cache(healthy, target, k_scale=1.0, v_scale=_WRONG_SCALE)


def quantise_cache(healthy: Path, target: Path, *, k_scale: float, v_scale: float) -> None:
    """The checkpoint asks for an FP8 KV cache, with these scales in all layers.

    The entry of config.json and the names of the scales are those of compressed-tensors, as llm-compressor writes them.
    """
    from safetensors.numpy import save_file

    make_variant(healthy, target, _CONFIG)
    config = json.loads((healthy / _CONFIG).read_text(encoding="utf-8"))
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": ["lm_head"],
        "kv_cache_scheme": scheme,
    }
    (target / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
    scales: dict[str, Any] = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn"
        scales[f"{prefix}.k_scale"] = np.array(k_scale, dtype=np.float32)
        scales[f"{prefix}.v_scale"] = np.array(v_scale, dtype=np.float32)
    save_file(scales, target / "kv_scales.safetensors", metadata={"format": "pt"})


def scaled_queries(healthy: Path, target: Path) -> None:
    """The query weights of one layer are too large by a power of two."""
    make_variant(healthy, target, _WEIGHTS)
    path = target / _WEIGHTS
    shutil.copyfile(healthy / _WEIGHTS, path)
    scale_tensor(path, f"model.layers.{_SCALED_LAYER}.self_attn.q_proj.weight", _SCALED_BY)


def scale_tensor(path: Path, name: str, factor: float) -> None:
    """Multiply one bfloat16 tensor of a safetensors file, in place.

    The format (huggingface/safetensors, README): 8 bytes little-endian size of the header, the header as JSON, then the
    tensors' bytes at the offsets that it names.

    Raises:
        ValueError: the file has no such tensor, or it isn't bfloat16.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size)).get(name)
        if entry is None or entry["dtype"] != "BF16":
            raise ValueError(f"{path.name} must have a bfloat16 tensor {name}, got {entry}")
        begin, end = entry["data_offsets"]
        file.seek(8 + size + begin)
        bits = np.frombuffer(file.read(end - begin), dtype="<u2").astype(np.uint32) << 16
        scaled = bits.view(np.float32) * np.float32(factor)
        file.seek(8 + size + begin)
        file.write((scaled.view(np.uint32) >> 16).astype("<u2").tobytes())


def _no_fp8_cache() -> str | None:
    """vLLM's CPU backend has an FP8 KV cache only where its AVX-512 kernels run."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        flags = ""
    return None if " avx512f" in flags else "vLLM's FP8 KV cache on a CPU needs AVX-512"


def _no_cpu_kernel() -> str | None:
    """Another device's kernels are not vLLM's to wrap."""
    from vllm.platforms import current_platform

    return None if current_platform.is_cpu() else "it breaks vLLM's kernel for CPUs"


FAULTS: Final[tuple[Fault, ...]] = (
    Fault(
        "rope-theta",
        f"config.json has rope_theta {_WRONG_THETA:,.0f} instead of 100,000",
        "Drift",
        make=wrong_rope_theta,
    ),
    Fault(
        "kv-scale",
        f"FP8 KV cache with k_scale {_WRONG_SCALE:g} in the checkpoint: large keys are cut off",
        "SinkLost",
        also=("KvCacheQuantization",),
        make=wrong_key_scale,
        needs=_no_fp8_cache,
    ),
    Fault(
        "value-scale",
        f"FP8 KV cache with v_scale {_WRONG_SCALE:g} in the checkpoint: large values are cut off",
        "KvCacheQuantization",
        make=wrong_value_scale,
        needs=_no_fp8_cache,
    ),
    Fault(
        "query-weights",
        f"the query weights of layer {_SCALED_LAYER} are {_SCALED_BY:g} times too large",
        "EntropyCollapse",
        # The layers above see what it made of its input.
        also=("Drift",),
        make=scaled_queries,
    ),
    Fault(
        "no-template",
        "a client sends its prompts without chat template, thus without the first special token",
        "Drift",
        bare_prompts=True,
    ),
    Fault(
        "broken-kernel",
        f"the attention kernel makes head {BROKEN_HEAD}'s output in layer {BROKEN_LAYER} {BROKEN_BY - 1:.0%} too large",
        "OutputWrong",
        breaks_kernel=True,
        needs=_no_cpu_kernel,
    ),
)
