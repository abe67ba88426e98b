"""Program of the tests: vLLM's real CUDA selection of attention backends with the GPU and its kernels stubbed, as JSON.

    python tests/integration/cuda_selection.py CASES

CASES is a JSON list of `[backend or null, fields of AttentionSelectorConfig]`. For each it gives the resolved class, or
vLLM's error. Stubbed are the compiled extensions that a CPU build lacks, and what the platform says of the device.
"""

import json
import sys
import types
from typing import Any, Final

EXTENSIONS: Final = ("_C_stable_libtorch", "vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C")


def stub_platform() -> None:
    """Make vLLM believe in an H100 before it looks for a platform."""
    for extension in EXTENSIONS:
        sys.modules[f"vllm.{extension}"] = types.ModuleType(f"vllm.{extension}")
    from vllm import platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class StubbedGpu(cuda.NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "stubbed H100"

    platforms._current_platform = StubbedGpu()
    platforms.current_platform = platforms._current_platform


def select(backend: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    """What `get_attn_backend` does with a layer."""
    import torch
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    fields = {"head_size": 64, "kv_cache_dtype": "auto", "block_size": None, "dtype": "bfloat16", **fields}
    config = selector.AttentionSelectorConfig(**{**fields, "dtype": getattr(torch, fields["dtype"])})
    member = AttentionBackendEnum[backend] if backend else None
    try:
        cls: Any = selector._cached_get_attn_backend(member, config, num_heads=8)
    except ValueError as error:
        return {"error": str(error)}
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "name": cls.get_name()}


def main(cases: list[Any]) -> None:
    """Register glassbox, select, print."""
    stub_platform()
    from glassbox.plugin import register

    register()
    results = [select(backend, fields) for backend, fields in cases]
    sys.stdout.write(f"RESULT {json.dumps(results)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
