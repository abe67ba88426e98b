"""Log-probabilities of the tokens of traced requests, as the engine gave them, in files beside the traces.

Owns these files. A worker doesn't hear of log-probabilities: the process that turns the engine's output into answers
leaves them here, and whoever reads a trace finds them under the same request and client.
"""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core.files import FileVersion
from glassbox.store.file_names import clean, request_digest
from glassbox.store.trace_record import UNKNOWN
from glassbox.store.trusted_file import list_files, make_folder, read_file, write_file

_PREFIX: Final = "logprobs-"
_SUFFIX: Final = ".f32"
_DTYPE: Final = np.dtype("<f4")
# More tokens than any context has.
MAX_BYTES: Final = 1 << 26
# Files are counted again after so many were written.
_PRUNE_EVERY: Final = 64


def _name(internal_id: str, client: str | None) -> str:
    # A client chooses a part of the id, so nothing of it stands in a name; whose the file is does.
    return f"{_PREFIX}{clean(client or UNKNOWN)}-{request_digest(internal_id, client)}{_SUFFIX}"


def _too_many(files: Mapping[str, FileVersion], keep: int) -> list[str]:
    """Names of the files beyond `keep`: each time the oldest of the client that has most, as with traces."""
    of_clients: dict[str, deque[str]] = {}
    for name in sorted(files, key=lambda name: files[name][1]):
        of_clients.setdefault(name.rpartition("-")[0], deque()).append(name)
    return [max(of_clients.values(), key=len).popleft() for _ in range(len(files) - keep)]


class LogprobsFiles:
    """Writes them.

    Args:
        directory: of the traces.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = Path(directory)
        self._written = 0

    def write(self, internal_id: str, client: str | None, logprobs: npt.ArrayLike, *, keep: int) -> None:
        """Leave those of a request, and remove what is beyond about `keep`.

        Raises:
            OSError: it can't be written.
        """
        make_folder(self._directory)
        write_file(self._directory / _name(internal_id, client), np.asarray(logprobs, dtype=_DTYPE).tobytes())
        self._written += 1
        if self._written % _PRUNE_EVERY == 0:
            files = list_files(self._directory, _PREFIX, _SUFFIX)
            for name in _too_many(files, keep):
                (self._directory / name).unlink(missing_ok=True)


def read_logprobs(
    directory: Path, internal_id: str, client: str | None, num_generated: int
) -> npt.NDArray[np.floating[Any]]:
    """Those of a request's tokens, float32 [num_generated]; NaN where nobody left any.

    Raises:
        OSError: there is a file that can't be trusted or read.
    """
    out = np.full(num_generated, np.nan, dtype=np.float32)
    try:
        data = read_file(Path(directory) / _name(internal_id, client), MAX_BYTES)
    except FileNotFoundError:
        return out
    found = np.frombuffer(data[: len(data) // _DTYPE.itemsize * _DTYPE.itemsize], dtype=_DTYPE)[:num_generated]
    out[: len(found)] = found
    return out
