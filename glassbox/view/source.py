"""A run by what a user calls it: a URL or a JSONL file."""

import re
from pathlib import Path

from glassbox.view.asking import NO_ACCESS, Access
from glassbox.view.measured import Measured
from glassbox.view.scrape import fetch
from glassbox.view.windows import read_run


def is_url(name: str) -> bool:
    """True for http(s) URLs and, unless there is such a file, for `host:port`."""
    if name.startswith(("http://", "https://")):
        return True
    return bool(re.fullmatch(r"[^/\s]+:\d+(/.*)?", name.rpartition("@")[2])) and not Path(name).exists()


def load(name: str, engine: str | None = None, access: Access = NO_ACCESS) -> Measured:
    """All of what a run has measured: a server's totals, or the sum of a file's windows.

    Raises:
        ViewError: it can't be read.
    """
    return fetch(name, engine=engine, access=access) if is_url(name) else read_run([Path(name)], engine).total
