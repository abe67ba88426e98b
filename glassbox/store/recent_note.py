"""Empty files by which processes of a node tell each other that something was asked of them of late.

Owns their form alone: what a note means, its name and for how long it counts are said where it is used.
"""

import time
from pathlib import Path


def note(path: Path) -> None:
    """Say so, now.

    Raises:
        OSError: it can't be written, or its folder isn't there.
    """
    path.touch(mode=0o600)


def is_recent(path: Path, within_s: float) -> bool:
    """Whether that was said in the last `within_s` seconds."""
    try:
        return time.time() - path.stat().st_mtime < within_s
    except OSError:
        return False
