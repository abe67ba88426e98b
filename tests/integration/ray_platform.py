"""vLLM's platform for CPUs with the one name that its Ray executors ask for: what Ray calls the devices.

A platform plugin: vLLM's own has none and refuses Ray. The devices are GPUs that Ray is told of and nobody looks for.
"""

from vllm.platforms.cpu import CpuPlatform


class CpuPlatformOfRay(CpuPlatform):
    ray_device_key = "GPU"


def ray_platform() -> str:
    """The class, for vLLM's plugin loader."""
    return f"{CpuPlatformOfRay.__module__}.{CpuPlatformOfRay.__qualname__}"
