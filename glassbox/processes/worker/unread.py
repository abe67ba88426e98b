"""Says it when what a node measures reaches nobody.

A node of a server may have no API server (`--headless`, Ray): nobody scrapes a /metrics of vLLM there, and if the
configuration asks for no other export, the snapshots lie in the run directory until they are removed.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from glassbox.config.load import GlassboxConfig
from glassbox.core.logs import get_logger
from glassbox.processes.exporter.launch import is_needed
from glassbox.store.api_server_note import is_noted
from glassbox.store.ownership import UNREAD_NAME

logger = get_logger(__name__)

# API servers come up together with the engine, or a little later.
GRACE_S: Final = 60.0


class UnreadWatch:
    """Looks whether anybody reads a run directory, and says once per node if not.

    Args:
        run_dir: of the server on this node; it exists.
        clock: seconds.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir = Path(run_dir)
        self._clock = clock
        self._since_s = clock()
        self._done = False

    def look(self, config: GlassboxConfig) -> None:
        """Say it if the time for it has come; costs next to nothing.

        Raises:
            OSError: the run directory can't be written to.
        """
        if self._done or not config.enabled or is_needed(config) or self._clock() - self._since_s < GRACE_S:
            return
        self._done = True
        why = "no API server of vLLM runs here whose /metrics would show it"
        if is_noted(self._run_dir):
            if config.export.prometheus.on_vllm_port or not config.export.prometheus.enabled:
                return
            why = "export.prometheus.on_vllm_port is false, and there is no port of glassbox's own"
        if self._first_to_say():
            logger.warning(
                "What this node measures reaches nobody: %s. Set export.http.port or export.otel in glassbox.yaml "
                "(docs/distributed.md)",
                why,
            )

    def _first_to_say(self) -> bool:
        """One of the node's workers."""
        try:
            os.close(os.open(self._run_dir / UNREAD_NAME, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return False
        return True
