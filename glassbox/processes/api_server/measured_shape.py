"""How many layers and heads of its model a server has, as its workers have found it.

Owns asking them. The model's configuration has one number of heads and counts a layer that runs several times once, so
it says too few of a model whose layers differ, or which loops. The workers' snapshots have it right.
"""

import threading
from pathlib import Path

from glassbox.core.logs import get_logger
from glassbox.store.snapshot import read_snapshots

logger = get_logger(__name__)


class MeasuredShape:
    """Of one server; asked only for what the configuration lacks, and read once, for it stays what it is.

    Args:
        run_dir: of the server.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._known: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> tuple[int, int]:
        """Numbers of layers and of heads, of the layer that has most; 0 as long as no worker of this node tells."""
        with self._lock:
            if self._known is None:
                try:
                    found = read_snapshots(self._run_dir)
                except OSError as error:
                    logger.debug("the run directory can't be read: %s", error)
                    found = []
                if not found:
                    return 0, 0
                self._known = max(one.num_layers_total for one in found), max(one.num_heads_total for one in found)
            return self._known
