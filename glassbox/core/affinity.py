"""CPU affinity and priority of what runs beside a worker.

vLLM binds a CPU worker to the cores it computes on (OpenMP's affinity, numactl), and whatever the worker starts is
bound with it: an exporter there would take time from the computation, and get next to none itself.
"""

import contextlib
import os
import threading
from typing import Final

_LAST: Final = 19


def leave_workers_cores(task: int) -> None:
    """Let a process or thread run wherever the worker's parent may, which is not bound.

    Does nothing where there is no such thing as affinity, or the parent's may not be read.

    Args:
        task: id of a child process, or native id of a thread of this process; 0 is the calling thread.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(task, os.sched_getaffinity(os.getppid()))


def come_last() -> None:
    """Give the calling thread, and the threads that it will start, the lowest priority: it takes next to nothing from
    whoever computes on the same core. There is no way back. Does nothing where threads have no priority of their own.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LAST)
