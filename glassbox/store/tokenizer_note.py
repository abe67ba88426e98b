"""Where the served model's tokenizer lies, told by a worker in a file of the run directory."""

import json
from pathlib import Path
from typing import Final

from glassbox.core.files import write_atomically

_NAME: Final = "tokenizer.json"


def note_path(run_dir: Path) -> Path:
    """The file: JSON with `tokenizer` and `revision`, as `write_source` takes them."""
    return Path(run_dir) / _NAME


def write_source(run_dir: Path, tokenizer: str, revision: str | None) -> None:
    """Tell the server's processes where the tokenizer lies: a folder or a name of the model hub.

    Raises:
        OSError: it cannot be written.
    """
    path = note_path(run_dir)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"tokenizer": tokenizer, "revision": revision}).encode())
