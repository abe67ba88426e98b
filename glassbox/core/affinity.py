"""CPU affinity and priority of what runs beside a worker.

vLLM binds a CPU worker to the cores it computes on (OpenMP's affinity, numactl), and whatever the worker starts is
bound with it: an exporter there would take time from the computation, and get next to none itself.
"""

import contextlib
import os
from pathlib import Path
from typing import Final

LAST: Final = 19


def leave_workers_cores(task: int) -> None:
    """Let a process or thread run wherever the worker's parent may, which is not bound.

    Does nothing where there is no such thing as affinity, or the parent's may not be read.

    Args:
        task: id of a child process, or native id of a thread of this process; 0 is the calling thread.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(task, os.sched_getaffinity(os.getppid()))


def give_way(niceness: int) -> None:
    """Lower the priority of this process by so much; 19 takes next to nothing from whoever computes.

    Linux may schedule sessions against each other first (`sched_autogroup_enabled`), where a process's own niceness
    counts within its session alone: a session that this process leads gets it, too.
    """
    with contextlib.suppress(OSError):
        os.nice(niceness)
    with contextlib.suppress(OSError):
        if os.getsid(0) == os.getpid():
            Path("/proc/self/autogroup").write_text(str(niceness))
