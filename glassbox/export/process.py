"""The exporter process: one per server, beside its workers, so that no export costs the engine anything.

Owns its loop and its end (`main`), the lock that makes it the only one, and its starting and restarting from
a worker (`ExporterProcess`). What it writes is `sinks.py`.
"""

import argparse
import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from glassbox import rundir
from glassbox.affinity import leave_workers_cores
from glassbox.config import ConfigError, GlassboxConfig, load_config
from glassbox.config_watch import ConfigWatcher
from glassbox.export.sinks import Sinks, is_needed
from glassbox.logs import get_logger, set_level

__all__ = ["ExporterLock", "ExporterProcess", "is_needed", "main"]

logger = get_logger(__name__)

LOCK_NAME: Final = "exporter.lock"
# A worker looks whether the lock is free by taking it for an instant; an exporter that starts then tries
# again.
_LOCK_ATTEMPTS: Final = 4
_LOCK_PAUSE_S: Final = 0.03
# Only where the kernel has no pidfd (before Linux 5.3, some sandboxes).
_PARENT_POLL_S: Final = 0.5
_NICENESS: Final = 10
_LONGEST_BACKOFF_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 3.0
_BINDING_VARIABLES: Final = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")


class ExporterLock:
    """The lock file of a run directory; whoever holds it is the server's exporter."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path = path
        self._handle = handle

    @classmethod
    def acquire(cls, run_dir: Path) -> "ExporterLock | None":
        """Take the lock; None if another process holds it.

        Raises:
            OSError: if the lock file cannot be made.
        """
        path = Path(run_dir) / LOCK_NAME
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for attempt in range(_LOCK_ATTEMPTS):
            if attempt:
                time.sleep(_LOCK_PAUSE_S)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return cls(path, handle)
        os.close(handle)
        return None

    @staticmethod
    def is_held(run_dir: Path) -> bool:
        """True if some process holds the lock."""
        try:
            handle = os.open(Path(run_dir) / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)  # gives the lock back
        return False

    def renew(self) -> bool:
        """Keep the lock although a cleaner of temporary files removed it.

        Returns:
            False if another process has taken it.
        """
        try:
            if os.stat(self._path).st_ino == os.fstat(self._handle).st_ino:
                return True
        except FileNotFoundError:
            if not self._path.parent.is_dir():
                return True  # there is nothing to be the exporter of, until a worker makes the directory again
        again = ExporterLock.acquire(self._path.parent)
        if again is None:
            return False
        os.close(self._handle)
        self._handle = again._handle
        return True

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._handle)


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
    current = config

    def on_change(new: GlassboxConfig) -> None:
        nonlocal current
        current = new
        set_level(new.log_level)
        wakeups.wake()

    # The workers report a bad edit; here it only must not be taken.
    watcher = ConfigWatcher(config_path, on_change, lambda error: logger.debug("%s", error), initial=config)
    watcher.start()
    sinks = Sinks(run_dir, lambda: current)
    try:
        while not stop and not wakeups.parent_gone():
            if not lock.renew():
                logger.info("glassbox's exporter %d ends: another one has taken over", os.getpid())
                return
            seen, next_round = current, time.monotonic() + current.export.interval_s
            sinks.round()
            while not stop and not wakeups.parent_gone() and current is seen and time.monotonic() < next_round:
                wakeups.sleep(next_round - time.monotonic())
        sinks.round(last=True)
    finally:
        watcher.stop()
        sinks.close()
        wakeups.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the exporter of a server until its parent ends or SIGTERM arrives.

    Returns:
        0, also if the server has an exporter already; 2 if the configuration cannot be loaded.
    """
    parser = argparse.ArgumentParser(prog="python -m glassbox.export", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the workers leave their snapshots")
    parser.add_argument("--config", type=Path, required=True, help="the YAML file")
    parser.add_argument("--parent-pid", type=int, required=True, help="process with whose end this one ends")
    options = parser.parse_args(argv)
    options.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = ExporterLock.acquire(options.run_dir)
    if lock is None:
        return 0
    try:
        try:
            config = load_config(options.config)
        except ConfigError as error:
            logger.error("%s", error)
            return 2
        set_level(config.log_level)
        with contextlib.suppress(OSError):
            os.nice(_NICENESS)
        _run(options.run_dir, options.config, config, options.parent_pid, lock)
        return 0
    finally:
        lock.release()


def _child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment in which the child finds this very package, and numpy starts no threads and binds none."""
    # Without what binds the worker's threads to its cores: the child's OpenMP would bind it there again.
    child = {name: value for name, value in environ.items() if name not in _BINDING_VARIABLES}
    child |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    # Not for an installed package: its directory would come before the standard library.
    if root.name not in {"site-packages", "dist-packages"}:
        child["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environ.get("PYTHONPATH"))))
    return child


class ExporterProcess:
    """A worker's hold on the server's exporter: starts it if it is needed and nobody else has.

    Attributes:
        deaths: how many exporters of this worker ended by themselves with an error.

    Args:
        config_path: the YAML file, absolute.
        run_dir: of the server. Default: `rundir.run_dir()`.
        environ: of the exporter. Default: this process's, as it is when the exporter is started.
        clock: seconds, for the time between restarts.
    """

    def __init__(
        self,
        config_path: Path,
        run_dir: Path | None = None,
        environ: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config_path = Path(config_path)
        self._run_dir = run_dir
        self._environ = environ
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._not_before = 0.0
        self._failures = 0
        self.deaths = 0

    @property
    def pid(self) -> int | None:
        """Process id of the exporter if this worker has started it and it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def ensure(self, config: GlassboxConfig) -> None:
        """Make sure that an exporter runs if `config` asks for one, and none of this worker's if not; never
        waits.

        An exporter that died is started again after 1, 2, 4, ... at most 60 seconds.

        Raises:
            RuntimeError: once for each exporter that died.
            OSError: if it cannot be started.
        """
        self._reap()
        environ = os.environ if self._environ is None else self._environ
        if not is_needed(config, environ):
            if self._process is not None:
                self._process.terminate()  # reaped by a later call
            return
        run_dir = rundir.run_dir() if self._run_dir is None else self._run_dir
        if self._process is None and self._clock() >= self._not_before and not ExporterLock.is_held(run_dir):
            self._start(run_dir, environ)

    def _start(self, run_dir: Path, environ: Mapping[str, str]) -> None:
        # -P: a file of the working directory must not shadow a module.
        command = [sys.executable, "-P", "-m", "glassbox.export", "--run-dir", str(run_dir)]
        command += ["--config", str(self._config_path), "--parent-pid", str(os.getpid())]
        self._started = self._clock()
        self._process = subprocess.Popen(
            command,
            env=_child_environ(environ),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        leave_workers_cores(self._process.pid)

    def _reap(self) -> None:
        if self._process is None or (code := self._process.poll()) is None:
            return
        self._process = None
        now = self._clock()
        # It ended because another one holds the lock, or was asked to.
        if code in (0, -signal.SIGTERM):
            self._not_before = now + 1.0
            return
        self.deaths += 1
        self._failures = 0 if now - self._started > _LONGEST_BACKOFF_S else self._failures
        backoff = min(2.0**self._failures, _LONGEST_BACKOFF_S)
        self._failures += 1
        self._not_before = now + backoff
        raise RuntimeError(f"the exporter ended with exit status {code}; it is started again in {backoff:g} s")

    def stop(self) -> None:
        """End this worker's exporter after its last export; waits at most a few seconds."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
