"""Whether a server needs an exporter process, and a worker's hold on it.

Owns starting it, starting it again, and ending it. What it does is its own: nothing of that is imported here, since
every worker imports this.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import glassbox
from glassbox.config.load import GlassboxConfig
from glassbox.core.affinity import leave_workers_cores
from glassbox.core.logs import get_logger
from glassbox.processes.exporter.log_relay import open_relay
from glassbox.processes.exporter.silence import SilenceWatch, kill_exporter
from glassbox.store import multiprocess_files, rundir
from glassbox.store.exporter_lock import ExporterLock
from glassbox.store.metrics_page import has_front
from glassbox.store.score_files import are_awaited

logger = get_logger(__name__)

_LONGEST_BACKOFF_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 3.0
# Without a sign of life, of which there is one every few seconds: then it was stopped, or hangs. Whoever has started it
# comes first.
REPLACE_AFTER_S: Final = 120.0
_REPLACE_ANOTHERS_AFTER_S: Final = 240.0
_BINDING_VARIABLES: Final = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")


def wants_records(config: GlassboxConfig) -> bool:
    """True if the configuration asks for records of traces."""
    return config.enabled and config.requests.records.path is not None


def wants_spans(config: GlassboxConfig) -> bool:
    """True if the configuration asks for spans, and requests may be traced."""
    otel = config.export.otel
    return may_trace(config) and otel.enabled and otel.traces


def may_trace(config: GlassboxConfig) -> bool:
    """True if requests may be traced."""
    return config.enabled and (config.requests.opt_in or config.requests.trace_rate > 0)


def wants_scores(config: GlassboxConfig) -> bool:
    """True if the configuration asks for scores or signals of traced requests; clients may ask for signals, too."""
    return may_trace(config) and bool(config.probes or config.sampled_signals)


def wants_actions(config: GlassboxConfig) -> bool:
    """True if there are rules."""
    return config.enabled and bool(config.actions.rules)


def is_needed(config: GlassboxConfig, environ: Mapping[str, str] | None = None, run_dir: Path | None = None) -> bool:
    """True if the configuration asks for anything that only an exporter process does.

    Args:
        config: of the moment.
        environ: of the worker; by default this process's.
        run_dir: of the server; None leaves out the page that an API server of this node hands out, and the signals on
            demand that it has shown to be missing.
    """
    environ = os.environ if environ is None else environ
    export = config.export
    if not config.enabled:
        return False
    pushed = (export.otel.enabled and export.otel.metrics) or export.jsonl.path is not None
    pushed = pushed or wants_records(config) or wants_spans(config)
    pushed = pushed or wants_scores(config) or wants_actions(config)
    pushed = pushed or (run_dir is not None and may_trace(config) and are_awaited(run_dir))
    is_handed_out = run_dir is not None and has_front(run_dir)
    by_exporter = is_handed_out or multiprocess_files.directory(environ) is not None
    at_vllm = export.prometheus.shown_at_vllm and by_exporter
    return pushed or at_vllm or export.own_port is not None


def _child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment in which the child finds this very package, and numpy starts no threads and binds none."""
    # Without what binds the worker's threads to its cores: the child's OpenMP would bind it there again.
    child = {name: value for name, value in environ.items() if name not in _BINDING_VARIABLES}
    child |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    root = Path(glassbox.__file__).resolve().parents[1]
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
        self._silence = SilenceWatch(clock)
        self._is_killed = False
        self.deaths = 0

    @property
    def pid(self) -> int | None:
        """Process id of the exporter if this worker has started it and it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def ensure(self, config: GlassboxConfig) -> None:
        """Make sure that an exporter runs if `config` asks for one, and none of this worker's if not; never
        waits.

        An exporter that died is started again after 1, 2, 4, ... at most 60 seconds. One that gives no sign of life for
        two minutes is killed and replaced, also one whose worker is gone.

        Raises:
            RuntimeError: once for each exporter that died or was killed, and for one that can't be killed.
            OSError: if it cannot be started.
        """
        self._reap()
        environ = os.environ if self._environ is None else self._environ
        run_dir = rundir.run_dir() if self._run_dir is None else self._run_dir
        if not is_needed(config, environ, run_dir):
            if self._process is not None:
                self._process.terminate()  # reaped by a later call
            return
        if ExporterLock.is_held(run_dir):
            self._replace_silent(run_dir)
        elif self._process is None and self._clock() >= self._not_before:
            self._start(run_dir, environ, config)

    def _replace_silent(self, run_dir: Path) -> None:
        silent_s = self._silence.look(run_dir)
        if silent_s < (_REPLACE_ANOTHERS_AFTER_S if self._process is None else REPLACE_AFTER_S):
            return
        self._silence.forget()
        if self._process is not None:
            pid: int | None = self._process.pid
            self._process.kill()
            self._is_killed = True
        else:
            pid = kill_exporter(run_dir)
        told = f"the exporter gives no sign of life for {silent_s:.0f} s: it was stopped, or hangs"
        told += f"; process {pid} is killed and replaced" if pid else "; it can't be killed from here: end it by hand"
        logger.warning("%s", told)  # each time; of errors only the first is logged
        raise RuntimeError(told)

    def _start(self, run_dir: Path, environ: Mapping[str, str], config: GlassboxConfig) -> None:
        # -P: a file of the working directory must not shadow a module.
        command = [sys.executable, "-P", "-m", "glassbox.processes.exporter", "--run-dir", str(run_dir)]
        command += ["--config", str(self._config_path), "--parent-pid", str(os.getpid()), "--in-force"]
        self._started = self._clock()
        # Not as an argument, which anybody on the machine may read: there may be a collector's token in it.
        with tempfile.TemporaryFile() as in_force, open_relay() as log:
            in_force.write(config.model_dump_json().encode())
            in_force.seek(0)
            self._process = subprocess.Popen(
                [*command, "--log-to", str(log.fileno())],
                env=_child_environ(environ),
                stdin=in_force,
                start_new_session=True,
                pass_fds=(log.fileno(),),
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
        killed, self._is_killed = self._is_killed, False
        if killed and code == -signal.SIGKILL:
            return  # told when it was; the next call starts another
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
            # It had no time to remove them.
            environ = os.environ if self._environ is None else self._environ
            multiprocess_files.purge_dead(multiprocess_files.directory(environ))
        self._process = None
