"""The exporter process: one per server, beside its workers, so that no export costs the engine anything.

Owns its loop and its end (`main`). What it writes is `sinks.py`, how a worker starts it `launch.py`.
"""

import argparse
import contextlib
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from glassbox.config.load import ConfigError, GlassboxConfig, load_config
from glassbox.config.watch import ConfigWatcher
from glassbox.core.affinity import give_way
from glassbox.core.logs import get_logger, set_level
from glassbox.processes.exporter.log_relay import send_logs
from glassbox.processes.exporter.sinks import Sinks
from glassbox.signals.probe_files import require_probes
from glassbox.store.exporter_lock import ExporterLock

logger = get_logger(__name__)

# Only where the kernel has no pidfd (before Linux 5.3, some sandboxes).
_PARENT_POLL_S: Final = 0.5
_NICENESS: Final = 10
# Between two signs of life, however long the interval.
_BEAT_S: Final = 10.0
# After an edit of the YAML, good or bad, workers write what follows of it at once: then vLLM's page is looked after.
_EDITED_S: Final = 4.0
_LOOK_S: Final = 0.25


class _Wakeups:
    """What may interrupt the exporter's sleep: a signal, an edited configuration, the end of the parent."""

    def __init__(self, parent_pid: int) -> None:
        self._parent_pid = parent_pid
        self._parent_gone = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)
        self._pidfd: int | None = None
        try:
            self._pidfd = os.pidfd_open(parent_pid)
            self._poll.register(self._pidfd, select.POLLIN)
        except ProcessLookupError:
            self._parent_gone = True
        except OSError as error:
            logger.debug("no pidfd (%s): looking for the parent every %g s", error, _PARENT_POLL_S)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def wake(self) -> None:
        """End the current or next sleep; from any thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._writer, b"\0")

    def sleep(self, seconds: float) -> None:
        """Sleep until something happens, at most `seconds`."""
        if self._pidfd is None:
            seconds = min(seconds, _PARENT_POLL_S)
        self._poll.poll(max(0.0, seconds) * 1000)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._reader, 4096):
                pass

    def parent_gone(self) -> bool:
        """True once the parent has ended (a zombie has, too)."""
        if self._parent_gone:
            return True
        if self._pidfd is not None:
            self._parent_gone = bool(select.select([self._pidfd], [], [], 0)[0])
        else:
            try:
                os.kill(self._parent_pid, 0)
            except ProcessLookupError:
                self._parent_gone = True
        return self._parent_gone

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        for handle in (self._reader, self._writer, self._pidfd):
            if handle is not None:
                os.close(handle)


def _run(run_dir: Path, config_path: Path, config: GlassboxConfig, parent_pid: int, lock: ExporterLock) -> None:
    """Export every interval, at each edit of the configuration and once more at the end."""
    stop = False

    def on_signal(signum: int, frame: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_signal)
    # Ctrl-C reaches the whole group; the parent's end tells when it is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wakeups = _Wakeups(parent_pid)
    current, edited_s = config, -math.inf

    def on_change(new: GlassboxConfig) -> None:
        nonlocal current, edited_s
        current, edited_s = new, time.monotonic()
        set_level(new.log_level)
        wakeups.wake()

    def on_error(error: ConfigError) -> None:
        nonlocal edited_s
        edited_s = time.monotonic()
        logger.debug("%s", error)  # the workers report a bad edit; here it only must not be taken
        wakeups.wake()

    watcher = ConfigWatcher(config_path, on_change, on_error, initial=config, also=require_probes)
    watcher.start()
    sinks = Sinks(run_dir, lambda: current, beat=lock.beat)
    try:
        while not stop and not wakeups.parent_gone():
            if not lock.renew():
                logger.info("glassbox's exporter %d ends: another one has taken over", os.getpid())
                return
            seen, next_round = current, time.monotonic() + current.export.interval_s
            sinks.round()
            while not stop and not wakeups.parent_gone() and current is seen and time.monotonic() < next_round:
                edited = time.monotonic() - edited_s < _EDITED_S
                wakeups.sleep(min(next_round - time.monotonic(), _LOOK_S if edited else _BEAT_S))
                lock.beat()
                if edited:
                    sinks.look()
        sinks.round(last=True)
    finally:
        watcher.stop()
        sinks.close()
        wakeups.close()


def _in_force() -> GlassboxConfig:
    return GlassboxConfig.model_validate(json.loads(sys.stdin.buffer.read()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the exporter of a server until its parent ends or SIGTERM arrives.

    Returns:
        0, also if the server has an exporter already; 1 if it came to a bad end, which the log tells; 2 if the
        configuration cannot be loaded and no other one was given.
    """
    parser = argparse.ArgumentParser(prog="python -m glassbox.processes.exporter", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the workers leave their snapshots")
    parser.add_argument("--config", type=Path, required=True, help="the YAML file")
    parser.add_argument("--parent-pid", type=int, required=True, help="process with whose end this one ends")
    parser.add_argument("--in-force", action="store_true", help="begin with the settings on standard input, as JSON")
    parser.add_argument("--log-to", type=int, help="open socket to who logs for this one; default: stderr")
    options = parser.parse_args(argv)
    if options.log_to is not None:
        send_logs(options.log_to)
    options.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = ExporterLock.acquire(options.run_dir)
    if lock is None:
        return 0
    try:
        try:
            # What the parent has in force: an exporter that starts anew while the file is bad must go on as the last.
            config = _in_force() if options.in_force else load_config(options.config)
        except ConfigError as error:
            logger.error("%s", error)
            return 2
        set_level(config.log_level)
        give_way(_NICENESS)
        try:
            _run(options.run_dir, options.config, config, options.parent_pid, lock)
        except Exception:
            logger.exception("glassbox's exporter ends because of an error")
            return 1
        return 0
    finally:
        lock.release()
