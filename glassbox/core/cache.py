"""Where glassbox keeps what it can make again: the demo's model, compiled kernels."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/glassbox`, else `~/.cache/glassbox` (not created here)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification has relative paths ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "glassbox"
