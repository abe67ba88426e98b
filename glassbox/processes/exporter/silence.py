"""Notices that a server's exporter gives no sign of life, and ends it.

Owns when silence is a fact, and that nothing but an exporter is killed. Who decides is `launch.py`.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from glassbox.store.exporter_lock import ExporterLock

# So many looks without a new sign: after a pause of everything (a frozen container, a suspended machine) the watcher
# may run before the exporter does.
_LOOKS: Final = 4


class SilenceWatch:
    """For how long the exporter of a run directory has been silent, by the clock of who watches it.

    Args:
        clock: seconds; that of the file's times may jump.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._beat_s: float | None = None
        self._since_s, self._looks = 0.0, 0

    def look(self, run_dir: Path) -> float:
        """Seconds since when the last few looks found no new sign of life."""
        beat_s, now_s = ExporterLock.last_beat_s(run_dir), self._clock()
        if beat_s is None or beat_s != self._beat_s:
            self._beat_s, self._since_s, self._looks = beat_s, now_s, 0
        self._looks += 1
        return now_s - self._since_s if self._looks >= _LOOKS else 0.0


def kill_exporter(run_dir: Path) -> int | None:
    """Kill the process that holds the lock of a run directory, if it is an exporter.

    Returns:
        Its process id; None if it isn't seen from here, is none, or may not be killed.
    """
    pid = ExporterLock.holder(run_dir)
    if pid is None:
        return None
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        # After the handle: from here on the number can't come to stand for another process.
        if b"glassbox.processes.exporter" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return None
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except OSError:
        return None
    finally:
        os.close(handle)
    return pid
