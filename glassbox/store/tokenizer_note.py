"""Where the served model's tokenizer lies, told by a worker in a file of the run directory."""

import json
from pathlib import Path
from typing import Final

from glassbox.store.trusted_file import MAX_NOTE_BYTES, make_folder, read_file, write_file

NAME: Final = "tokenizer.json"


def read_source(run_dir: Path) -> bytes:
    """The note: JSON with `tokenizer` and `revision`, as `write_source` takes them.

    Raises:
        OSError: there is none, or it is not one of this user's processes'.
    """
    return read_file(Path(run_dir) / NAME, MAX_NOTE_BYTES)


def write_source(run_dir: Path, tokenizer: str, revision: str | None) -> None:
    """Tell the server's processes where the tokenizer lies: a folder or a name of the model hub.

    Raises:
        OSError: it cannot be written.
    """
    make_folder(Path(run_dir))
    write_file(Path(run_dir) / NAME, json.dumps({"tokenizer": tokenizer, "revision": revision}).encode())
