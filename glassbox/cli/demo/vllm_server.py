"""One `vllm serve` as a child process: started, waited for, asked, and stopped with nothing left behind.

Used by the demo, the end-to-end tests and the benchmarks. It knows nothing of glassbox: what the server runs
with is in `args` and `env`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx
import psutil
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from glassbox.cli.demo.ports import HOST, free_port

_POLL_S: Final = 0.2
_TERM_S: Final = 20.0
# While it starts, vLLM doesn't listen to SIGTERM, and there is nothing yet to end in order.
_TERM_STARTING_S: Final = 3.0
_KILL_S: Final = 10.0


class ServerError(RuntimeError):
    """The server died or didn't get healthy; the message ends with the last lines of its log."""


class VllmServer:
    """`vllm serve` on the loopback interface, as a context manager.

    Args:
        model: the folder (or name) to serve.
        args: further arguments of `vllm serve`.
        env: environment variables over this process's own; None takes one away.
        log_path: file that gets the server's stdout and stderr (overwritten).
        port: TCP port; None takes a free one.
        start_timeout_s: how long `/health` may take to answer.
        on_wait: called every 0.2 s while waiting for `/health`.
        cwd: working directory of the server; None is this process's.
        prefix: words before the command; what they name must `exec` the rest (`nice`, `setpriv`).

    Raises:
        ServerError: (on enter) the server ended or wasn't healthy in time.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        log_path: Path,
        port: int | None = None,
        start_timeout_s: float = 900.0,
        on_wait: Callable[[], None] = lambda: None,
        cwd: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://{HOST}:{self.port}"
        self.log_path = log_path
        self._model = str(model)
        self._args = tuple(args)
        self._env = dict(env or {})
        self._start_timeout_s = start_timeout_s
        self._on_wait = on_wait
        self._cwd = cwd
        self._prefix = tuple(prefix)
        self._process: subprocess.Popen[bytes] | None = None
        self._healthy = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the API server, which is also the id of the process group."""
        if self._process is None:
            raise ServerError("the server isn't started; call start() first")
        return self._process.pid

    @property
    def running(self) -> bool:
        """True while the API server's process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and return when `/health` answers 200.

        Raises:
            ServerError: it ended or wasn't healthy in time (it is stopped then), or it is started already.
        """
        if self._process is not None:
            raise ServerError("the server is started already; call stop() first")
        command = [*self._prefix, sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self._model]
        command += ["--host", HOST, "--port", str(self.port), *self._args]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=self._cwd,
                # Its own group: Ctrl-C reaches only us, and stop() reaches all of its processes.
                start_new_session=True,
            )
        try:
            self._wait_healthy()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for whoever is left after 20 s (3 s if it was still starting).

        Returns when all its processes are gone; does nothing if it isn't started.
        """
        if self._process is None:
            return
        # Looked up before anything dies: a process that moved to a group of its own is still a descendant.
        family = self.processes()
        if self._process.poll() is None:
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_TERM_S if self._healthy else _TERM_STARTING_S)
        family = _unique([*family, *self.processes()])
        for number, limit_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, _KILL_S)):
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            _, family = psutil.wait_procs(_living(family), timeout=limit_s)
            if not family:
                break
        self._process.wait(_KILL_S)
        self._process, self._healthy = None, False

    def processes(self) -> list[psutil.Process]:
        """The server's living processes: its descendants and all of its process group (zombies left out)."""
        if self._process is None:
            return []
        group = self._process.pid
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [psutil.Process(group), *psutil.Process(group).children(recursive=True)]
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(process.pid) == group:
                    found.append(process)
        return _living(_unique(found))

    def metrics_text(self) -> str:
        """`/metrics` as text.

        Raises:
            httpx.HTTPError: the server didn't answer, or not with success.
        """
        return (
            httpx.get(f"{self.url}/metrics", timeout=30.0, follow_redirects=True, trust_env=False)
            .raise_for_status()
            .text
        )

    def metrics(self) -> list[Metric]:
        """`/metrics` as metric families (errors as in `metrics_text`)."""
        return list(text_string_to_metric_families(self.metrics_text()))

    def log_tail(self, lines: int = 40) -> str:
        """The last `lines` lines of the server's log."""
        try:
            text = self.log_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _environment(self) -> dict[str, str]:
        # No hub, no usage report, and vLLM's internal sockets on the loopback interface.
        fixed = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": HOST}
        merged = {**os.environ, **fixed, **self._env}
        return {name: value for name, value in merged.items() if value is not None}

    def _wait_healthy(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        with httpx.Client(timeout=5.0, trust_env=False) as client:  # a proxy knows nothing of this host
            while time.monotonic() < deadline:
                if not self.running:
                    code = self._process.returncode if self._process else None
                    raise ServerError(f"vllm serve ended with exit status {code}; its log:\n{self.log_tail()}")
                # Refused, reset or slow answers mean: not yet.
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{self.url}/health").status_code == httpx.codes.OK:
                        self._healthy = True
                        return
                self._on_wait()
                time.sleep(_POLL_S)
        raise ServerError(f"vllm serve must be healthy within {self._start_timeout_s:g} s; its log:\n{self.log_tail()}")


def _unique(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return list(dict.fromkeys(processes))


def _living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    living = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            # A zombie has ended; an init process that doesn't reap (many containers) would keep it for ever.
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living
