"""vLLM's watch for kernels that Triton compiles as it serves (`vllm.utils.jit_monitor`), put aside for a while.

It begins as vLLM's warm-up ends, which is before glassbox's does. What that compiles vLLM would warn of, or fail, with
`--jit-monitor-mode error`: the layer would count as one whose kernel can't be compiled.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unmonitored() -> Iterator[None]:
    """What Triton compiles in the block is told to nobody."""
    triton = sys.modules.get("triton")  # where it isn't imported it compiles nothing
    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    if runtime is None or not hasattr(runtime, "jit_post_compile_hook"):  # vLLM hangs on to no other
        yield
        return
    hook, runtime.jit_post_compile_hook = runtime.jit_post_compile_hook, None
    try:
        yield
    finally:
        runtime.jit_post_compile_hook = hook
