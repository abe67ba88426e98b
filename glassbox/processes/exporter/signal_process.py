"""A process of its own for signals on demand, which clients ask for and which take up to a minute of a core each.

Owns both ends: the exporter's, which asks, and the program, `python -m glassbox.processes.exporter.signal_process`.
In a thread of the exporter they would either take a core from the model or, at the lowest priority, keep the
interpreter's lock for as long as nobody lets them run.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Final

from glassbox.core.affinity import LAST, give_way
from glassbox.core.logs import get_logger
from glassbox.signals.scores import signals_within
from glassbox.signals.values import SignalValues
from glassbox.store.trace_record import RequestTrace

logger = get_logger(__name__)

# What is asked for ends by itself within half of this, if it is given a core.
PATIENCE_S: Final = 150.0
_PARENT_POLL_S: Final = 1.0


class SignalProcess:
    """The exporter's end. The process is started when it is first needed, and again if it has ended.

    Args:
        patience_s: how long one request may take, in seconds; then the process is ended.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None if there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def values(self, trace: RequestTrace, names: Sequence[str]) -> dict[str, SignalValues]:
        """Signals of a traced request by name, as `signal_values`; what can't be computed is refused with a reason."""
        try:
            connection = self._running()
            connection.send((trace, tuple(names)))
            if connection.poll(self._patience_s):
                found: dict[str, SignalValues] = connection.recv()
                return found
            why = (
                f"was not done within {self._patience_s:g} s beside the model, which comes first; send a shorter "
                "prompt, or leave a core to glassbox's exporter"
            )
        except (EOFError, OSError) as error:  # it ended, or can't be started
            why = (
                f"failed: {self._how_it_ended(error)}; ask for fewer layers and heads, or give the exporter more memory"
            )
        self.close()
        logger.warning("%s of a request %s", ", ".join(names), why)
        return {name: SignalValues(refused=f"{name} {why}") for name in names}

    def close(self) -> None:
        """End the process, whatever it does; the next request starts another one."""
        self.kill()
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.wait()
        self._process = self._connection = None

    def kill(self) -> None:
        """End the process; from any thread. Who waits for it is told that it has failed."""
        if (process := self._process) is not None:
            process.kill()

    def _running(self) -> Connection:
        if self._connection is not None and self.pid is not None:
            return self._connection
        self.close()
        mine, theirs = Pipe()
        with theirs:
            # -P: a file of the working directory must not shadow a module. In a session of its own, see `give_way`.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._connection = mine
        return mine

    def _how_it_ended(self, error: Exception) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                return f"the process that computes it ended with status {self._process.wait(1.0)}"
        return f"the process that computes it: {type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """A killed exporter closes no connection that this process would look at before it is done."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(0)

    threading.Thread(target=watch, name="glassbox-parent", daemon=True).start()


def main(argv: Sequence[str]) -> int:
    """Compute what is asked for over the connection, until the other end is closed."""
    give_way(LAST)
    _end_with_parent()
    with Connection(int(argv[0])) as connection, contextlib.suppress(EOFError, OSError):
        while True:
            trace, names = connection.recv()
            connection.send(signals_within(trace, names))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
