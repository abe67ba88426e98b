"""The kernel for CPUs is compiled while vLLM loads the model, so that no start waits for the compiler."""

import threading
from contextlib import suppress


def compile_ahead() -> threading.Thread:
    """Begin, on a thread, unless it lies in the cache. Whoever needs the kernel meanwhile waits for it.

    What goes wrong here goes wrong there again, where it is told.
    """
    thread = threading.Thread(target=_compile, name="glassbox-compile", daemon=True)
    thread.start()
    return thread


def _compile() -> None:
    with suppress(Exception):
        from glassbox.kernels.row_stats_native import compile_native_kernel

        compile_native_kernel()
